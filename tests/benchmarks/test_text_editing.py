"""The benchmark of edited sentences: its measures and moves against closed forms, and its parts of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.core.bench import Bench
from benchmarks.core.data import MissingDataError
from benchmarks.core.runs import Run
from benchmarks.core.schemas import composed
from benchmarks.methods import make_method
from benchmarks.tasks import load_task
from benchmarks.text_editing import report
from benchmarks.text_editing.judges import LabellingJudge, WordJudge
from benchmarks.text_editing.measures import best_of, estimates, read_out, wins
from benchmarks.text_editing.moves import ASCENT_STEP, ascent, pair_rows, preference_pairs, shift
from benchmarks.text_editing.prompting import FewShot, chosen_by_b, cleaned, examples, few_shot_turns
from benchmarks.text_editing.sentences import Sentence, held_out, sentences_of, training
from benchmarks.text_editing.task import _Rounds, halves
from pfm.generators import CallableGenerator


def test_wins_count_ties_half() -> None:
    assert wins([0.0, 1.0, 2.5, -1.0], [0.0, 1.0, 1.0, 2.0]).tolist() == [0.125, 0.5, 1.0, 0.0]


def test_the_read_out_takes_the_nearest_that_is_allowed() -> None:
    distances = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    b = np.array([[0.4, 0.6, 0.9], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]])
    assert read_out(distances, b, np.array([0.5, 0.5, 0.5]), 0.0).tolist() == [1, -1, 2]
    assert read_out(distances, b, np.array([0.5, 0.5, 0.5]), 0.2).tolist() == [2, -1, -1]


def test_best_of_n_has_the_mean_of_the_largest_of_n_uniforms() -> None:
    uniform = (np.arange(4000) + 0.5) / 4000
    for n in (1, 2, 8):
        assert best_of(uniform, uniform, n, 20_000, 0).mean() == pytest.approx(n / (n + 1), abs=0.01)
    other = np.random.default_rng(0).permutation(uniform)  # a judge that has nothing to do with the first
    assert best_of(uniform, other, 8, 20_000, 0).mean() == pytest.approx(0.5, abs=0.01)


def test_perplexity_is_the_exponential_of_nats_a_token() -> None:
    ones = np.ones(4)
    found = estimates(ones, 0 * ones, np.array([0.0, 2.0]), 0.5 * ones, ones > 0, np.log(7) * 10 * ones, 10 * ones)
    assert {name: figure.value for name, figure in found.items() if figure} == pytest.approx(
        {"win": 0.5, "gain": 1.0, "cosine": 0.5, "same": 1.0, "perplexity": 7.0}
    )


def test_pairs_are_ordered_by_score_and_their_shift_is_the_mean_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(64, 5, generator=generator)
    scores = vectors[:, 0]
    pairs = preference_pairs(vectors, scores, 0, sets=True)
    assert len(pairs) == 32
    assert bool((pairs.chosen[:, 0] > pairs.rejected[:, 0]).all())
    torch.testing.assert_close(shift(pairs), (pairs.chosen - pairs.rejected).mean(0))
    assert pairs.candidates is not None
    assert sorted(int(row) for found in pairs.candidates for row in found.rows) == list(range(64))


def test_the_pairs_that_a_prompt_shows_are_those_that_flows_are_fitted_on() -> None:
    vectors = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    _, chosen, rejected = pair_rows(vectors[:, 0], 3)
    pairs = preference_pairs(vectors, vectors[:, 0], 3, sets=False)
    torch.testing.assert_close(vectors[chosen], pairs.chosen)
    torch.testing.assert_close(vectors[rejected], pairs.rejected)


def test_a_prompt_shows_the_pairs_nearest_to_the_draft_and_to_each_other_best_last() -> None:
    axes = torch.eye(4)
    rejected, chosen = axes[[0, 0, 1, 2]], axes[[1, 0, 1, 2]]  # the second is near the draft, and its members are alike
    assert examples(axes[:1], chosen, rejected, 2)[0][-1] == 1
    assert sorted(examples(axes[:1], chosen, rejected, 9)[0]) == [0, 1, 2, 3]
    turns = few_shot_turns("a draft", [("bad", "good")])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"] == "good"
    assert turns[2]["content"].endswith("Sentence: a draft")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fine film.", "a fine film."),
        ('\n\nSentence: "a fine film." \nIt keeps the topic.', "a fine film."),
        ("“好 film”", "好 film"),
        ('""', ""),
        ("\u2028 \n", ""),
    ],
)
def test_the_first_line_of_an_answer_is_the_rewrite(text: str, expected: str) -> None:
    assert cleaned(text) == expected


class Slope:
    """Gives b = sigmoid of the first value, and moves along it."""

    guard_margin = 0.1

    def win_probability(self, y: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(y[:, 0])


def test_rewrites_are_chosen_by_b_and_the_careful_choice_keeps_the_content() -> None:
    z = torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, 1.0]])
    found = torch.tensor([[[0.5, 1.0], [9.0, 1.0]], [[0.0, 1.0], [0.1, 1.0]], [[5.0, 1.0], [4.0, 1.0]]])
    places = chosen_by_b(Slope(), z, found, 0.1)  # pyright: ignore[reportArgumentType]
    assert places["few-shot, 1 call"].tolist() == [0, 0, 0]
    assert places["few-shot, best of 2 by b"].tolist() == [1, -1, -1]
    assert places["few-shot, best of 2 by b, near"].tolist() == [0, -1, -1]


def test_a_rewrite_that_fails_leaves_the_draft() -> None:
    def answer(prompt: list[dict[str, str]]) -> str:
        draft = prompt[-1]["content"].rpartition("Sentence: ")[2]
        if draft == "broken":
            raise RuntimeError("out of order")
        return f'"{draft}, and good"\nDone.'

    z = torch.eye(3)[:2]
    rival = FewShot(1, 2, 0, CallableGenerator(answer))
    written = rival(["dull", "broken"], z, [("bad", "good")], z[:1], z[:1])
    assert written == [["dull, and good"] * 2, ["broken"] * 2]


def test_further_rounds_move_and_edit_what_the_round_before_wrote() -> None:
    """An encoder of numbers as texts, and an editor that writes the number at the point."""

    class Numbers:
        def encode(self, texts: list[str], **_: object) -> torch.Tensor:
            return torch.tensor([[float(text), 1.0] for text in texts])

    class Writer:
        def edit(self, texts: list[str], z: torch.Tensor, point: torch.Tensor) -> tuple[list[list[str]], int]:
            return [[f"{float(row[0]):g}", text] for row, text in zip(point, texts, strict=True)], 2 * len(texts)

    def moved(z: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"flow x1": z + torch.tensor([1.0, 0.0])}

    # From 2 on b rises by less than the margin, so that the draft stays.
    for count, expected in ((1, ["1", "2"]), (3, ["2", "2"])):
        rounds = _Rounds(Writer(), Numbers(), {"flow": Slope()}, moved, count)  # pyright: ignore[reportArgumentType]
        z = Numbers().encode(["0", "2"])
        assert rounds("flow x1", ["0", "2"], z, moved(z)["flow x1"]) == expected
        assert rounds.tokens == 4 * count


def test_ascent_goes_along_great_circles_to_the_rating_s_pole() -> None:
    slope = torch.tensor([1.0, 0.0, 0.0])
    y = torch.nn.functional.normalize(torch.tensor([[0.0, 1.0, 0.0], [-0.1, 0.0, 1.0]]), dim=1)
    found = ascent(lambda rows: 5 * rows @ slope, y)
    for length, place in found.items():
        torch.testing.assert_close(place.norm(dim=1), torch.ones(2))
        angle = torch.arccos((place * y).sum(1).clamp(-1, 1))
        assert bool((angle <= length + 1e-3).all())  # a step along the gradient lies partly off the sphere
        assert bool((place @ slope > y @ slope).all())
    first = found[min(found)]
    steps = round(min(found) / ASCENT_STEP)
    expected = y[:1]
    for _ in range(steps):
        expected = torch.nn.functional.normalize(expected + ASCENT_STEP * slope, dim=1)
    torch.testing.assert_close(first[:1], expected)


def test_judges_tell_what_they_were_fitted_on_and_not_shuffled_labels() -> None:
    rng = np.random.default_rng(0)
    nouns = [f"noun{place}" for place in range(20)]
    texts = [f"a {rng.choice(nouns)} that is {word}" for word in ("fine", "poor") for _ in range(60)]
    liked = [True] * 60 + [False] * 60
    assert WordJudge(texts, liked).accuracy(texts, liked) == 1.0
    mixed = rng.permutation(liked).tolist()
    fresh = [f"the {noun} is {word}" for noun in nouns for word in ("fine", "poor")]
    assert WordJudge(texts, mixed).accuracy(fresh, [True, False] * 20) < 0.9
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    judge = LabellingJudge(vectors, (vectors[:, 2] > 0).tolist())
    assert float(((judge(vectors) > 0) == (vectors[:, 2] > 0)).float().mean()) > 0.95
    assert int(judge.slope.abs().argmax()) == 2


def test_sentences_are_cut_and_short_or_long_ones_left_out() -> None:
    text = 'No. It was a fine film.<br /><br />He said "go on." Then it ended!  And ' + "very " * 30 + "slowly."
    assert list(sentences_of(text)) == ["It was a fine film.", 'He said "go on.', "Then it ended!"]


def test_nothing_held_out_is_trained_on() -> None:
    try:
        apart = {s.text.lower() for name in ("imdb", "rt_polarity") for s in held_out(name)}
    except MissingDataError as error:
        pytest.skip(str(error))
    assert len(apart) > 10_000
    assert not apart & {text.lower() for text in training(films=True)}


def test_the_judgeshalves_share_no_review_and_hold_both_kinds() -> None:
    rows = [Sentence(f"text {number}", number % 2 == 1, number // 3) for number in range(60)]  # as they alternate
    rows += [Sentence(f"other {number}", number % 2 == 1, 20 + number) for number in range(8)]
    first, second = halves(rows)
    assert not {s.review for s in first} & {s.review for s in second}
    assert sorted(s.text for s in first + second) == sorted(s.text for s in rows)
    alternating = halves(rows[60:])
    assert all({s.liked for s in half} == {False, True} for half in alternating)


def test_a_missing_editor_is_named_with_the_way_to_one(tmp_path: Path) -> None:
    config = composed("task=text_editing", "method=pfm", f"task.decoder={tmp_path}")
    with pytest.raises(MissingDataError, match="pfm train-decoder"):
        load_task(config.task, 0).run(make_method(config.method), Bench("minilm", "chunk", 0, False))


def test_the_table_joins_seeds(tmp_path: Path) -> None:
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    def run(seed: int, win: float) -> Run:
        names = {
            f"{name}.{part}": figure(win) for name in ("copy", "flow x1", "ascent 0.2") for part in ("win", "cosine")
        }
        names |= {f"best of {n}.win": figure(0.6) for n in (2, 8)}
        about = {"editor": "PointerWriter", "drafts": 4, "samples": 2, "guidance": 1.0, "independent_accuracy": 0.7}
        described = {"task": {"name": "text_editing"}, "method": {"name": "pfm"}, "seed": seed}
        return Run(tmp_path, {"kind": "text_editing", "figures": names, "about": about, "settings": described})

    text = report.markdown([run(0, 0.5), run(1, 0.6), run(2, 0.7)])
    assert "| flow x1 | 0.600 ± 0.248 |" in text
    assert "| flow x1 | 0.500 ± 0.100 |" in report.markdown([run(0, 0.5)])
    report.save_plot([run(0, 0.5)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
