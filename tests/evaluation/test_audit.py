"""The audit of a selector: exact figures by hand, controls that gain nothing, and rows of every kind of badness."""

import csv
import io
import json
import math
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pfm.cli import app
from pfm.data.errors import PreferenceDataError
from pfm.evaluation import Audit, audit
from pfm.evaluation.auditing.choices import Choices
from pfm.statistics import Bootstrap

EVIL = "<script>alert('x')</script> [bold red]"


def run(rows, selectors: Any = "pick", **options):
    return audit(rows, selectors, progress=False, **{"resamples": 200, **options})


def drawn(prompts=60, n=5, skill=1.0, seed=0):
    """Make rows whose selector sees quality with noise, and whose fast runs are the good ones."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        quality = rng.normal(size=n)
        rows.append(
            {
                "prompt": f"Task {prompt}",
                "candidates": ["w" * int(size) for size in rng.integers(1, 60, size=n)],
                "scores": quality.tolist(),
                "selector": (skill * quality + rng.normal(size=n)).tolist(),
                "seconds": (9 - quality + 0.3 * rng.normal(size=n)).tolist(),
            }
        )
    return rows


def by_candidate(rows):
    return [
        {
            "group": row["prompt"], "candidate": row["candidates"][k], "score": row["scores"][k],
            "selector": row["selector"][k], "seconds": row["seconds"][k],
        }
        for row in rows
        for k in range(len(row["scores"]))
    ]  # fmt: skip


# -- figures by hand -------------------------------------------------------------------------------------------------


def test_every_method_by_hand():
    rows = [
        {"candidates": ["aa", "b", "ccc"], "scores": [0, 6, 3], "pick": 1, "seconds": [1, 2, 3]},
        {"candidates": ["a", "bbb", "cc"], "scores": [9, 0, 3], "pick": 2, "seconds": [3, 1, 2]},
    ]
    found = run(rows)
    means = {row.name: row.score.value for row in found.rows}
    assert means == pytest.approx(
        {
            "pick": 4.5, "random": 3.5, "first": 4.5, "longest": 1.5, "shortest": 7.5, "least seconds": 0.0,
            "permuted": means["permuted"], "oracle": 7.5,
        }
    )  # fmt: skip
    closed = {row.name: row.gap_closed.value for row in found.rows if row.gap_closed}
    assert closed["pick"] == pytest.approx(1 / 4)
    assert closed["least seconds"] == pytest.approx(-3.5 / 4)
    assert (closed["random"], closed["oracle"]) == (0, 1)
    assert found.row("shortest").difference("pick").value.value == pytest.approx(-3)
    tested = found.row("pick")
    assert tested.win is not None
    assert tested.win.value == pytest.approx((1 + 1 / 2) / 2)
    assert tested.length_ratio is not None
    assert tested.length_ratio.value == pytest.approx((1 / 2 + 2 / 2) / 2)


def test_equal_best_scores_share_the_pick():
    found = run([{"scores": [0, 1, 5], "pick": [2, 2, 1]}] * 3)
    assert found.row("pick").score.value == pytest.approx(0.5)
    undecided = run([{"scores": [0, 1, 5], "pick": [1, 1, 1]}] * 3)
    assert undecided.row("pick").score.value == pytest.approx(2)
    assert any("counts as a random candidate" in warning for warning in undecided.warnings)


def test_wins_at_equal_length_agree_with_all_pairs_listed():
    rng = np.random.default_rng(0)
    size = np.array([3, 1, 4, 2])
    choices = Choices(np.array([0, 1, 1, 2]), size, rng.normal(size=10), rng.integers(1, 9, size=10).astype(float))
    bootstrap = Bootstrap(3, 100)
    everyone = choices.win_at_equal_length(choices.random(), bootstrap)
    assert everyone is not None
    assert everyone.value == pytest.approx(0.5, abs=1e-6)  # each pair stands there in both orders
    oracle, win = choices.best(choices.score), choices.win(choices.best(choices.score), bootstrap)
    assert win is not None
    assert win.value == 1
    controlled = choices.win_at_equal_length(oracle, bootstrap)
    assert controlled is not None
    assert controlled.value > 0.9


def test_sets_of_one_prompt_are_one_prompt():
    once = run([{"prompt": "a", "scores": [0, 1], "pick": 1}, {"prompt": "b", "scores": [0, 1], "pick": 0}])
    often = run([{"prompt": "a ", "scores": [0, 1], "pick": 1}] * 5 + [{"prompt": "b", "scores": [0, 1], "pick": 0}])
    assert (often.settings["prompts"], often.settings["sets"]) == (2, 6)
    assert often.row("pick").score == once.row("pick").score


def test_the_order_of_rows_and_the_layout_change_nothing():
    rows = drawn()
    found, reversed_, long = run(rows, "selector"), run(rows[::-1], "selector"), run(by_candidate(rows), "selector")
    for name in ("selector", "longest", "least seconds", "oracle"):
        assert long.row(name) == found.row(name)
        assert reversed_.row(name).score.value == pytest.approx(found.row(name).score.value)


# -- what it says ----------------------------------------------------------------------------------------------------


def test_the_fastest_run_that_beats_the_selector_is_the_headline():
    found = run(drawn(skill=0.3), "selector")
    finding = found.findings[0]
    assert (finding.outcome, finding.headline) == ("behind", "Taking the fastest beats selector")
    assert any(sentence.startswith("Taking the fastest reaches") for sentence in finding.sentences)


def test_a_selector_of_length_is_not_distinguishable_from_the_longest():
    rows = drawn(prompts=80)
    for row in rows:
        del row["seconds"]
        row["scores"] = [len(text) + 30 * score for text, score in zip(row["candidates"], row["scores"], strict=True)]
        row["selector"] = [len(text) + 0.1 * k for k, text in enumerate(row["candidates"])]
    finding = run(rows, "selector").findings[0]
    assert finding.outcome == "indistinguishable"
    assert finding.headline == "selector is not distinguishable from choosing the longest"


def test_a_good_selector_is_ahead_and_a_random_one_closes_nothing():
    rows = drawn(prompts=200, skill=3.0)
    rng = np.random.default_rng(1)
    for row in rows:
        del row["seconds"]
        row["guess"] = int(rng.integers(5))
    found = run(rows, ["selector", "guess"])
    assert [finding.outcome for finding in found.findings] == ["ahead", "indistinguishable"]
    for name in ("guess", "permuted"):
        closed = found.row(name).gap_closed
        assert closed is not None
        assert closed.low < 0 < closed.high
    assert found.row("guess").difference("selector").sign == 1
    assert "selector is ahead of guess" in " ".join(found.findings[0].sentences)


def test_three_prompts_confirm_nothing():
    found = run([{"scores": [0, 1], "pick": 1}] * 3)
    assert found.findings[0].outcome == "indistinguishable"
    assert any("Only 3 prompts" in warning for warning in found.warnings)


def test_where_the_judge_sees_no_difference_there_is_nothing_to_choose():
    found = run([{"scores": [2, 2], "pick": 1}, {"scores": [5], "pick": 0}])
    assert found.findings[0].outcome == "nothing to choose"
    assert found.row("oracle").gap_closed is None
    text = " ".join(found.warnings)
    assert "At 1 of 2 prompts there is one candidate" in text
    assert "At 1 of 2 prompts the judge gives all candidates the same score" in text


# -- fitted baselines ------------------------------------------------------------------------------------------------


def test_fitted_baselines_learn_what_can_be_learned_and_shuffled_labels_do_not():
    rows = drawn(prompts=40, n=4)
    for row in rows:
        marks = np.random.default_rng(len(row["candidates"][0])).permutation(4)
        row["candidates"] = [f"Yes{'!' * int(k)} It is {'so ' * int(k)}." for k in marks]
        row["scores"] = marks.tolist()
    found = run(rows, "selector", encoder="surface")
    closed = {name: found.row(name).gap_closed for name in ("mean_shift", "bradley_terry", "shuffled")}
    assert all(closed.values())
    assert min(closed["bradley_terry"].value, closed["mean_shift"].value) > 0.9  # type: ignore[union-attr]
    assert abs(closed["shuffled"].value) < 0.45  # type: ignore[union-attr]
    assert found.settings["encoder"] == "surface"


def test_pure_noise_teaches_the_fitted_baselines_nothing():
    found = run(drawn(prompts=120), "selector", encoder="surface")
    for name in ("mean_shift", "bradley_terry", "shuffled"):
        closed = found.row(name).gap_closed
        assert closed is not None
        assert closed.low < 0.05, name


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"scores": [0, 1], "pick": 1}] * 20, "the rows hold no texts"),
        ([{"prompt": str(n), "candidates": ["a", "b"], "scores": [0, 1], "pick": 1} for n in range(4)], "fewer than"),
        ([{"prompt": str(n), "candidates": ["a", "b"], "scores": [1, 1], "pick": 1} for n in range(20)], "too few"),
    ],
)
def test_baselines_that_cannot_be_fitted_say_why(rows, reason):
    found = run(rows, encoder="surface")
    assert reason in found.settings["left_out"][0]
    assert "bradley_terry" not in {row.name for row in found.rows}


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "picks",
    [
        {"pick": 1}, {"pick": 1.0}, {"pick": "1"}, {"pick": "b"}, {"pick": [0.1, 0.7]}, {"pick": "[0.1, 0.7]"},
        {"pick": [False, True]}, {"pick": ["false", "true"]}, {"pick": np.array([0.1, 0.7])}, {"pick": np.int64(1)},
    ],
)  # fmt: skip
def test_a_pick_may_be_a_place_a_text_or_scores(picks):
    found = run([{"candidates": ["a", "b"], "scores": [False, True]} | picks] * 2)
    assert found.row("pick").score.value == 1


BAD = [
    ({"scores": [1, math.nan], "pick": 0}, "scores", "got float nan"),
    ({"scores": [1, None], "pick": 0}, "scores", "the value is missing"),
    ({"scores": None, "pick": 0}, "scores", "the value is missing"),
    ({"scores": 3, "pick": 0}, "scores", "expected a list"),
    ({"scores": [], "pick": 0}, "scores", "no candidates"),
    ({"scores": [1, 2], "pick": 2}, "pick", "places count from 0 to 1"),
    ({"scores": [1, 2], "pick": -1}, "pick", "places count from 0 to 1"),
    ({"scores": [1, 2], "pick": 0.5}, "pick", "expected the place"),
    ({"scores": [1, 2], "pick": True}, "pick", "expected the place"),
    ({"scores": [1, 2], "pick": None}, "pick", "the value is missing"),
    ({"scores": [1, 2], "pick": [1]}, "pick", "got 1 values for 2 scores"),
    ({"scores": [1, 2], "pick": [1, math.inf]}, "pick", "got float inf"),
    ({"scores": [1, 2], "pick": 0, "candidates": ["a"]}, "candidates", "got 1 values for 2 scores"),
    ({"scores": [1, 2], "pick": 0, "candidates": ["a", None]}, "candidates", "the text is missing"),
    ({"scores": [1, "good"], "pick": 0}, "scores", "expected a finite number"),
    ({"scores": [1, 10**400], "pick": 0}, "scores", "expected a finite number"),
    ({"scores": [1, 1e300], "pick": 0}, "scores", "expected a finite number"),
    ({"scores": [1, "0,5"], "pick": 0}, "scores", "expected a finite number with a decimal point"),
    ({"scores": [1, 2], "pick": 0, "candidates": ["a", "\ud800"]}, "candidates", "half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "column", "problem"), BAD)
def test_a_bad_row_is_named_by_place_and_column_or_dropped_and_counted(row, column, problem):
    rows = [{"candidates": ["a", "b"], "scores": [0, 1], "pick": 1}, {"candidates": ["a", "b"], **row}]
    with pytest.raises(PreferenceDataError, match=f"rows, row 2, column '{column}'") as error:
        run(rows)
    assert problem in str(error.value)
    found = run(rows, on_bad_rows="drop")
    assert found.settings["prompts"] == 1
    assert "1 rows were dropped" in found.warnings[1]


def test_a_bad_candidate_drops_its_prompt_because_a_set_with_a_hole_was_not_chosen_from():
    rows = by_candidate(drawn(prompts=3))
    rows[7]["score"] = None
    with pytest.raises(PreferenceDataError, match="rows, row 8, column 'score'"):
        run(rows, "selector")
    found = run(rows, "selector", on_bad_rows="drop")
    assert found.settings["prompts"] == 2
    assert found.settings["dropped"] == {"missing value": 1, "of a prompt with a bad row": 4}


def test_nothing_left_is_an_error():
    with pytest.raises(PreferenceDataError, match="nothing is left"):
        run([{"scores": [math.nan], "pick": 0}], on_bad_rows="drop")
    with pytest.raises(PreferenceDataError, match="there are no rows"):
        run([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selectors": None}, "no selector is named"),
        ({"selectors": []}, "no selector is named.*columns that could be one: seconds_left, pick"),
        ({"selectors": "picks"}, "no column 'picks' for a selector: there are"),
        ({"selectors": "scores"}, "'scores' is the judge's column"),
        ({"selectors": ["pick", "pick"]}, "names a column twice"),
        ({"selectors": "pick", "scores": "judge"}, "no column 'judge' for the judge's scores"),
        ({"selectors": "pick", "costs": ["dollars"]}, "no column 'dollars' for a cost"),
        ({"selectors": "pick", "folds": 1}, "folds must be"),
        ({"selectors": "pick", "on_bad_rows": "skip"}, "on_bad_rows"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run([{"scores": [0, 1], "seconds_left": [1, 2], "pick": 1}], **options)


def test_rows_of_one_candidate_need_something_in_common():
    with pytest.raises(ValueError, match="a column that the candidates of one prompt share"):
        run([{"score": 1, "pick": 1}])
    with pytest.raises(TypeError, match="rows must be a list of dictionaries"):
        audit({"score": 1}, "pick")  # type: ignore[arg-type]


# -- files, pages and the command line --------------------------------------------------------------------------------


def test_a_table_of_text_a_parquet_file_and_lines_agree(tmp_path):
    rows = drawn(prompts=12)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = tmp_path / "rows.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [run(path, "selector").rows for path in (lines, table, tmp_path / "rows.parquet")]
    assert found[0] == found[1] == found[2] == run(rows, "selector").rows


def test_what_is_saved_is_read_back_and_the_page_runs_nothing(tmp_path):
    rows = [{**row, EVIL: row["selector"]} for row in drawn(prompts=30)]
    found = run(rows, [EVIL, "selector"])
    assert Audit.load_json(found.save_json(tmp_path / "audit.json")) == found
    page = found.save_html(tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    out = io.StringIO()
    found.print(Console(file=out, width=160))
    assert EVIL[:8] in out.getvalue()
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a report written by Audit"):
        Audit.load_json(tmp_path / "bad.json")


def test_the_command_shows_the_verdict_writes_both_files_and_names_mistakes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in drawn(skill=0.3)), encoding="utf-8")
    command = ["audit", str(rows), "--selector", "selector", "--no-progress"]
    done = CliRunner().invoke(
        app, [*command, "--html", str(tmp_path / "a" / "audit.html"), "--json-file", str(tmp_path / "audit.json")]
    )
    assert done.exit_code == 0, done.output
    assert "▼ Taking the fastest beats selector" in done.output
    assert (tmp_path / "a" / "audit.html").is_file()
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["findings"][0]["outcome"] == "behind"
    without = CliRunner().invoke(app, command[:2])
    assert without.exit_code == 2
    assert "--selector" in without.output
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"scores": [1, NaN], "selector": [1')
    broken = CliRunner().invoke(app, command)
    assert broken.exit_code == 2
    assert "line 61: the last line is cut short" in " ".join(broken.output.split())
    assert CliRunner().invoke(app, [*command, "--on-bad-rows", "drop"]).exit_code == 0


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_the_page_fits_a_narrow_window(tmp_path):
    path = run(drawn(prompts=30), "selector").save_html(tmp_path / "audit.html")
    page = path.read_text(encoding="utf-8")
    probe = "<script>document.title=document.documentElement.scrollWidth</script></body>"
    page = page.replace("default-src 'none'", "script-src 'unsafe-inline'").replace("</body>", probe)
    path.write_text(page, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout.split("<title>")[1].split("<")[0]) <= 500
