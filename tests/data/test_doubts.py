"""Doubts about pairs: raised where they hold, and never where they do not."""

from __future__ import annotations

import pytest

from pfm import PreferencePairs
from pfm.data.doubts import doubts
from pfm.quickstart import load_example

ROWS = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in load_example().pairs][::5]


def renamed(**names: str) -> PreferencePairs:
    """Give the example's columns the contents of others."""
    rows = [row | {name: row[other] for name, other in names.items()} for row in ROWS]
    return PreferencePairs.from_rows(rows, on_bad_rows="drop")


def test_the_example_raises_no_doubt():
    assert doubts(renamed()) == []
    assert doubts(renamed(chosen="rejected", rejected="chosen")) == []


@pytest.mark.parametrize(("column", "other"), [("chosen", "rejected"), ("rejected", "chosen")])
def test_a_response_column_that_changed_places_with_the_prompt_is_noticed(column, other):
    (doubt,) = doubts(renamed(prompt=column, **{column: "prompt"}))
    assert doubt.endswith(f"did the columns of prompt and {column} change places?")
    assert f"of {other!r}" in doubt


def test_clarifying_questions_that_are_preferred_are_no_change_of_places():
    rows = [
        {
            "prompt": f"Order lamp number {number} for the garden.",
            "chosen": f"Which of the lamps with number {number} do you want for the garden?",
            "rejected": f"I ordered the lamp with number {number} for the garden, it will come on Friday.",
        }
        for number in range(60)
    ]
    assert not any("change places" in doubt for doubt in doubts(PreferencePairs.from_rows(rows)))


@pytest.mark.parametrize(("share", "warned"), [(1.0, True), (0.9, True), (0.85, False), (0.5, False)])
@pytest.mark.parametrize("word", ["longer", "shorter"])
def test_length_that_explains_nearly_all_labels_is_said(share, warned, word):
    texts = ("one two three", "one two")
    first, second = texts if word == "longer" else texts[::-1]
    rows = [
        {"prompt": f"p {number}", "chosen": first, "rejected": second}
        if number < share * 20
        else {"prompt": f"p {number}", "chosen": second, "rejected": first}
        for number in range(20)
    ]
    found = [doubt for doubt in doubts(PreferencePairs.from_rows(rows)) if "length alone" in doubt]
    assert bool(found) == warned
    assert all(f"the chosen response is {word} in {share:.1%} of the pairs" in doubt for doubt in found)
    few = PreferencePairs.from_rows(rows[:9])
    assert doubts(few) == []


def test_pairs_in_both_directions_are_counted_once_each():
    a = {"prompt": "p", "chosen": "x", "rejected": "y"}
    turned = {"prompt": "p", "chosen": "y", "rejected": "x"}
    elsewhere = turned | {"prompt": "q"}  # of another prompt
    assert doubts(PreferencePairs.from_rows([a, elsewhere])) == []
    assert doubts(PreferencePairs.from_rows([a, a, elsewhere])) == []
    assert doubts(PreferencePairs.from_rows([a, turned]))[0].startswith("1 pair stands in both directions")
    assert doubts(PreferencePairs.from_rows([a, a, turned, turned]))[0].startswith("2 pairs stand in both directions")
