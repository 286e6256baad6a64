"""Rows of two responses and a verdict, in the layouts of public data sets."""

import csv

import pytest

from pfm.data import PreferenceDataError, PreferencePairs

LETTERS = {"prompt": "Why?", "response_a": "It rains.", "response_b": "No."}
NUMBERS = {"prompt": "Why?", "response_1": "It rains.", "response_2": "No."}
ZERO = {"prompt": "Why?", "response_0": "It rains.", "response_1": "No."}
STEERED = {"context": [{"role": "user", "content": "Why?"}], "response1": "It rains.", "response2": "No."}
MODELS = {"model_a": "small", "model_b": "large"}


def talk(text):
    return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]


ARENA = {"conversation_a": talk("It rains."), "conversation_b": talk("No."), **MODELS}


def of_three(first, second, tie):
    return LETTERS | {"winner_model_a": first, "winner_model_b": second, "winner_tie": tie}


FIRST = [
    LETTERS | {"winner": "model_a"},
    LETTERS | {"winner": "A"},
    LETTERS | MODELS | {"winner": "small"},
    LETTERS | {"preference": "response_a"},
    ARENA | {"winner": "model_a"},
    of_three(1, 0, 0),
    of_three("1", "0", "0"),
    ZERO | {"better_response_id": 0},
    NUMBERS | {"preference_strength": -1},
    NUMBERS | {"winner": 1},
    NUMBERS | {"preference": "1"},
    STEERED | {"overall_preference": -2.0},
]
SECOND = [
    LETTERS | {"winner": "model_b"},
    LETTERS | MODELS | {"winner": "large"},
    ARENA | {"winner": "model_b"},
    of_three(0, 1, 0),
    ZERO | {"better_response_id": 1},
    NUMBERS | {"preference_strength": "3"},
    NUMBERS | {"winner": 2.0},
    STEERED | {"overall_preference": 1},
]
TIES = [
    LETTERS | {"winner": "tie"},
    ARENA | {"winner": "tie (bothbad)"},
    of_three(0, 0, 1),
    NUMBERS | {"preference_strength": 0},
    STEERED | {"overall_preference": 0},
]


@pytest.mark.parametrize("row", FIRST)
def test_the_first_is_better(row):
    pairs = PreferencePairs.from_rows([row])
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == (["Why?"], ["It rains."], ["No."])
    assert pairs.probability is None
    assert not set(pairs.extra) & {"winner", "preference", "response_a", "context"}


@pytest.mark.parametrize("row", SECOND)
def test_the_second_is_better(row):
    pairs = PreferencePairs.from_rows([row])
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == (["Why?"], ["No."], ["It rains."])
    assert pairs.probability is None


@pytest.mark.parametrize("row", TIES)
def test_neither_is_better(row):
    pairs = PreferencePairs.from_rows([row])
    assert (pairs.prompts, pairs.probability) == (["Why?"], [0.5])


def test_a_table_with_ties_says_its_layout(tmp_path):
    with open(tmp_path / "arena.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [*LETTERS, "winner"])
        table.writeheader()
        table.writerows(LETTERS | {"winner": winner} for winner in ("model_a", "tie", "model_b"))
    pairs = PreferencePairs.from_file(tmp_path / "arena.csv")
    assert pairs.probability == [1.0, 0.5, 1.0]
    assert "two responses (response_a, response_b, winner)" in str(pairs.summary())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (LETTERS, "'response_a' and 'response_b' hold two responses, and none says which is better"),
        (LETTERS | {"winner": "gpt"}, "column 'winner': got str 'gpt'; expected 'a' where response_a is better"),
        (LETTERS | {"winner": 1}, "column 'winner': got int 1; expected 'a'"),
        (LETTERS | {"winner": True}, "column 'winner': got bool True"),
        (NUMBERS | {"winner": 0}, "expected '1' where response_1 is better"),
        (of_three(1, 1, 0), "expected 1 in one of winner_model_a"),
        (of_three(0, 0, 0), "expected 1 in one of winner_model_a"),
        (NUMBERS | {"preference_strength": "better"}, "column 'preference_strength': got str 'better'"),
        (NUMBERS | {"preference_strength": 10**400}, "column 'preference_strength': got int 1000"),
    ],
)
def test_a_verdict_that_is_none_is_a_bad_row(row, said):
    with pytest.raises(PreferenceDataError) as caught:
        PreferencePairs.from_rows([row])
    assert said in str(caught.value)
    assert len(PreferencePairs.from_rows([row, *FIRST[:1]], on_bad_rows="drop")) == 1


def test_columns_of_the_standard_layout_go_first():
    row = {"prompt": "Why?", "chosen": "x", "rejected": "y", "response_a": "a", "response_b": "b", "winner": "model_b"}
    assert PreferencePairs.from_rows([row]).chosen == ["x"]
