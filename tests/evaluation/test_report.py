"""The report card as JSON, HTML and terminal output: nothing lost, nothing executed, nothing fetched."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from pfm.evaluation import Failure, Report, Scored
from pfm.evaluation.render import page

EVIL = "<script>alert('x')</script> & \"quoted\" [bold red]"


def scored(n=60, m=5, evil="", probabilities=True, skill=1.5, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(n):
        quality = rng.normal(size=m)
        seen = skill * quality + rng.normal(size=m)
        rows.append(
            Scored(
                prompt=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{prompt} {evil}"}],
                candidates=[f"{prompt}/{k} {evil}" + "x" * int(rng.integers(40)) for k in range(m)],
                scores=quality,
                picks={f"my method {evil}": int(rng.integers(m)), "pfm": int(seen.argmax())},
                probabilities=1 / (1 + np.exp(-seen)) if probabilities else None,
                independent=float(rng.normal()),
                group=f"group {prompt % 3} {evil}",
            )
        )
    return rows


def make(evil="", **options):
    return Report.from_scored(
        scored(evil=evil, **options),
        failures=[Failure(7, f"GenerationError: timeout {evil}", False), Failure(9, "2 of 5 candidates", True)],
        settings={"judge": f"a judge {evil}", "left_out": [f"Something {evil}"], "model": f"some {evil}"},
        resamples=200,
    )


@pytest.fixture(scope="module")
def report():
    return make()


class Page(HTMLParser):
    """Collects the elements and the visible text of a page."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag, **attributes):
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.elements)


def number(element, name):
    return float(element.get(name, "nan"))


def svgs(source):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL)]


# ---- JSON


def test_json_round_trip_is_exact(report, tmp_path):
    path = report.save_json(tmp_path / "report.json")
    loaded = Report.load_json(path)
    assert loaded == report
    assert page(loaded) == page(report)
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert values == json.loads(json.dumps(report.to_dict()))
    assert values["verdict"]["outcome"] == "helps"


def test_json_of_a_bare_report_holds_nulls_and_no_nan(tmp_path):
    rows = [Scored("p", ["same", "same"], [1.0, 1.0], {"pfm": 0})]
    bare = Report.from_scored(rows, resamples=10)
    path = bare.save_json(tmp_path / "report.json")
    assert "NaN" not in path.read_text()
    assert Report.load_json(path) == bare
    assert bare.row("pfm").oracle_share is None
    page(bare)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99}', '{"format": 1, "rows": [{}]}', "nonsense"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is not a report"):
        Report.load_json(path)


# ---- HTML


def test_page_says_the_verdict_and_every_method(report):
    shown = Page(page(report))
    assert report.verdict.headline in shown.text
    for sentence in report.verdict.sentences + report.verdict.warnings:
        assert sentence in shown.text
    for row in report.rows:
        assert row.label in shown.text
        assert "{}{}".format(*row.win.parts(percent=True)) in shown.text
    assert "60 evaluated, 1 failed" in shown.text
    assert "Prompt 7: GenerationError: timeout" in shown.text
    assert "a judge" in shown.text
    assert report.calibration.sentence in shown.text


def test_page_needs_no_network_and_no_script(report):
    source = page(report)
    shown = Page(source)
    assert shown.count("script") == shown.count("link") == shown.count("img") == shown.count("iframe") == 0
    assert not re.search(r"https?://|@import|url\(", source)
    assert not any(name in ("src", "href") or name.startswith("on") for _, a in shown.elements for name in a)
    policy = next(a["content"] for t, a in shown.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_texts_of_others_are_escaped_everywhere():
    report = make(evil=EVIL)
    source = page(report)
    shown = Page(source)
    assert shown.count("script") == 0
    assert "<script" not in source
    assert shown.text.count(EVIL) > 10  # prompts, texts, method, group, failure, judge, reason, setting
    assert not any(
        "alert" in (value or "") and name != "aria-label" for _, a in shown.elements for name, value in a.items()
    )
    assert [len(svgs(source)), len(svgs(page(make())))] == [7, 7]


def test_plots_are_well_formed_and_described(report):
    plots = svgs(page(report))
    names = [plot.get("aria-labelledby") for plot in plots]
    assert len(set(names)) == len(plots) == 7
    for plot in plots:
        title, description = plot.find("title"), plot.find("desc")
        assert plot.get("role") == "img"
        assert title is not None
        assert description is not None
        assert title.text
        assert description.text
        assert plot.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        _, _, width, height = map(float, plot.get("viewBox", "").split())
        for mark in plot.iter("circle"):
            assert 0 <= number(mark, "cx") <= width
            assert 0 <= number(mark, "cy") <= height


def test_dots_stand_where_the_figures_are(report):
    forest = svgs(page(report))[0]
    ticks = {
        float(t.text[:-1]) / 100: number(t, "x")
        for t in forest.iter("text")
        if t.get("class") == "tick" and t.text and t.text.endswith("%")
    }
    (low, left), (high, right) = min(ticks.items()), max(ticks.items())
    dots = [number(c, "cx") for c in forest.iter("circle")]
    for row, x in zip(report.rows, dots, strict=True):
        assert low + (x - left) / (right - left) * (high - low) == pytest.approx(row.win.value, abs=0.003)


def test_tables_have_heads(report):
    shown = Page(page(report))
    assert shown.count("table") == 2
    assert shown.count("th", scope="row") == len(report.rows) + len(report.groups)
    assert shown.count("th", scope="col") > 8


@pytest.mark.parametrize(("asked", "shown"), [(0, 0), (1, 1), (4, 4), (1000, 20)])
def test_examples_are_shown_in_the_number_asked_for(report, asked, shown):
    source = page(report, examples=asked)
    assert Page(source).count("article") == shown
    assert ("largest loss" in source) == (shown > 0)


def test_sections_without_data_are_left_out():
    plain = Report.from_scored([Scored("p", [f"{k} a", f"{k} b"], [0, 1], {"pfm": 0}) for k in range(40)], resamples=20)
    text = Page(page(plain)).text
    assert "The flow changed nothing" in text
    for section in ("By group", "Can the win probabilities be believed", "Before and after", "Errors"):
        assert section not in text


def test_half_surrogates_do_not_stop_the_page(tmp_path):
    rows = [Scored("cut \ud83d", ["one", "two \ud83d"], [0, 1], {"pfm": 1})] * 3
    report = Report.from_scored(rows, resamples=10)
    assert "two ?" in report.save_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert Report.load_json(report.save_json(tmp_path / "r.json")) == report


@pytest.mark.parametrize(
    ("outcome", "change"),
    [("helps", 1.0), ("hurts", -1.0)],
)
def test_the_banner_carries_the_outcome(outcome, change):
    rows = scored()
    for row in rows:
        row.scores = change * np.asarray(row.scores)
    report = Report.from_scored(rows, resamples=100)
    assert report.verdict.outcome == outcome
    assert Page(page(report)).count("header", **{"class": f"verdict {outcome}"}) == 1


# ---- terminal


def printed(report, width):
    file = io.StringIO()
    report.print(Console(file=file, width=width, force_terminal=False))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_terminal_output_fits_and_says_the_verdict(report, width):
    output = printed(report, width)
    assert max(map(len, output.splitlines())) <= width
    assert report.verdict.headline in output
    assert report.row("pfm").win.parts(percent=True)[0] in output
    assert "…" not in output.replace("…, in", "")  # no figure is cut off
    assert ("fresh" in output) == (width == 160)


def test_markup_in_texts_of_others_is_not_interpreted():
    output = printed(make(evil="[bold red]x[/nothing]"), 160)
    assert "[bold red]x[/nothing]" in output


def figures(report: Any) -> tuple[Any, ...]:
    """Return all estimates of a report, and what its tests say."""
    rows = [
        (row.score, row.difference, row.win, row.win_controlled, row.win_independent, row.gap_closed)
        for row in report.rows
    ]
    calibration = report.calibration
    return rows, calibration and calibration.reliability.ece, calibration.accuracy, report.verdict.p_value


def test_rows_of_one_prompt_are_one_observation():
    rows = [replace(row, prompt=f"prompt {number}") for number, row in enumerate(scored(n=40))]
    once = Report.from_scored(rows, resamples=200)
    again = [replace(row, prompt=f" {str(row.prompt).upper()}\n") for row in rows]
    repeated = Report.from_scored([*rows, *again, *rows], resamples=200)
    for ours, theirs in zip(figures(repeated)[0], figures(once)[0], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            # within the ridge of length control
            assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-2)
    assert figures(repeated)[1].high == pytest.approx(figures(once)[1].high, abs=0.02)
    assert figures(repeated)[3] == figures(once)[3]
    assert repeated.settings["prompts"] == once.settings["prompts"] == 40
    assert any(warning.startswith("120 rows have 40 different prompts") for warning in repeated.verdict.warnings)
    assert not any("different prompts" in warning for warning in once.verdict.warnings)


def test_one_prompt_many_times_confirms_nothing():
    rows = [Scored("p", ["a", f"b {number}"], [0.0, 1.0], {"pfm": 1}) for number in range(50)]
    verdict = Report.from_scored(rows, resamples=50).verdict
    assert (verdict.wins, verdict.p_value) == (1, 1.0)
    assert verdict.outcome == "no evidence"
    apart = [replace(row, prompt="") for row in rows]  # without a prompt each row is one of its own
    assert Report.from_scored(apart, resamples=50).verdict.outcome == "helps"
