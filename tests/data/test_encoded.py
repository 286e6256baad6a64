"""Pairs as tensors: shapes, tables, splits, controls."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfm import EncodedPairs
from pfm.data.tensors import same_rows


def some_pairs(count: int = 12, dimension: int = 3, context: int = 2) -> EncodedPairs:
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(count // 2, context, generator=generator).repeat_interleave(2, 0)
    return EncodedPairs(
        torch.randn(count, dimension, generator=generator), torch.randn(count, dimension, generator=generator), contexts
    )


def test_plain_tensors_and_a_table_hold_the_same_pairs():
    outputs = torch.arange(12.0).reshape(4, 3)
    contexts = torch.tensor([[0.0], [1.0]])
    table = EncodedPairs.from_table(outputs, [0, 2, 3], [1, 3, 0], contexts=contexts, context_index=[0, 1, 1])
    plain = EncodedPairs(outputs[[0, 2, 3]], outputs[[1, 3, 0]], contexts[[0, 1, 1]])
    for one, other in ((table.chosen, plain.chosen), (table.rejected, plain.rejected), (table.context, plain.context)):
        torch.testing.assert_close(one, other)
    assert table.group.tolist() == [0, 1, 1]
    assert (table.group[1] == table.group[2]) == (plain.group[1] == plain.group[2])


def test_images_keep_their_shape():
    pairs = EncodedPairs(torch.zeros(5, 2, 4, 4), torch.ones(5, 2, 4, 4))
    assert pairs.chosen.shape == (5, 2, 4, 4)
    assert pairs.dimension == 32
    assert pairs.gather(torch.tensor([0, 1])).chosen.shape == (2, 32)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.integers(0, 6), min_size=2, max_size=40).filter(lambda g: len(set(g)) > 1),
    seed=st.integers(0, 9),
)
def test_a_split_never_cuts_a_group(groups, seed):
    count = len(groups)
    rows = torch.arange(count, dtype=torch.float32)[:, None]
    pairs = EncodedPairs(rows, rows + 0.5, group=torch.tensor(groups))
    train, held = pairs.split(0.3, seed)
    assert not set(train.group.tolist()) & set(held.group.tolist())
    assert sorted([*train.chosen.flatten().tolist(), *held.chosen.flatten().tolist()]) == rows.flatten().tolist()
    again = pairs.split(0.3, seed)
    assert again[1].chosen.tolist() == held.chosen.tolist()


@pytest.mark.parametrize("contexts", [torch.eye(2), None])
def test_candidates_follow_their_prompts_through_a_split(contexts):
    outputs = torch.randn(8, 2)
    rows = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])]
    pairs = EncodedPairs.from_table(
        outputs, [0, 4], [1, 5], contexts=torch.eye(2), context_index=[0, 1],
        candidates=[(0, rows[0], torch.arange(4.0)), (1, rows[1], torch.arange(4.0))],
    )  # fmt: skip
    train, held = pairs.split(0.5)
    assert train.candidates is not None
    assert held.candidates is not None
    assert {c.context_index for c in train.candidates} == set(train.group.tolist())
    assert {c.context_index for c in held.candidates} == set(held.group.tolist())


def test_swapping_twice_gives_the_pairs_back_and_shuffling_keeps_their_members():
    pairs = some_pairs()
    torch.testing.assert_close(pairs.swap().swap().chosen, pairs.chosen)
    torch.testing.assert_close(pairs.swap().chosen, pairs.rejected)
    shuffled = pairs.shuffle_labels(3)
    torch.testing.assert_close(shuffled.chosen + shuffled.rejected, pairs.chosen + pairs.rejected)
    flipped = (shuffled.chosen != pairs.chosen).any(1)
    assert 0 < int(flipped.sum()) < len(pairs)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: EncodedPairs(torch.zeros(3, 2), torch.zeros(3, 3)), r"\(3, 2\).*\(3, 3\)"),
        (lambda: EncodedPairs(torch.zeros(3), torch.zeros(3)), r"tensor\[:, None\]"),
        (lambda: EncodedPairs(torch.zeros(0, 2), torch.zeros(0, 2)), "no pairs"),
        (lambda: EncodedPairs(torch.tensor([[0.0], [float("nan")]]), torch.zeros(2, 1)), "chosen.*row 1"),
        (lambda: EncodedPairs(torch.zeros(2, 1), torch.tensor([[float("inf")], [0.0]])), "rejected.*row 0"),
        (lambda: EncodedPairs(torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(3, 1)), r"context must be \(2, C\)"),
        (lambda: EncodedPairs(torch.zeros(2, 1), torch.ones(2, 1), weight=[1.0, -1.0]), "row 1 is -1"),
        (lambda: EncodedPairs(torch.zeros(2, 1), torch.ones(2, 1), weight=[0.0, 0.0]), "above zero"),
        (lambda: EncodedPairs(torch.zeros(2, 1), torch.ones(2, 1), probability=[0.2, 1.2]), "row 1 is 1.2"),
        (lambda: EncodedPairs.from_table(torch.zeros(2, 1), [0], [2]), r"rejected_index must lie in 0\.\.1"),
        (lambda: EncodedPairs.from_table(torch.zeros(2, 1), [0], [1], contexts=torch.zeros(1, 1)), "context_index"),
        (lambda: some_pairs(2).split(), "one prompt"),
        (lambda: some_pairs().split(1.5), "between 0 and 1"),
    ],
)
def test_bad_input_is_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_what_is_not_numbers_is_a_type_error():
    with pytest.raises(TypeError, match="chosen must be a tensor"):
        EncodedPairs(["a", "b"], ["c", "d"])


# -- on disk --------------------------------------------------------------------------------------------------------


def stored_pairs(kind: str) -> EncodedPairs:
    generator = torch.Generator().manual_seed(0)
    if kind == "table":
        outputs, contexts = torch.randn(12, 2, 3, generator=generator), torch.randn(4, 5, generator=generator)
        rows = torch.arange(12).view(4, 3)
        return EncodedPairs.from_table(
            outputs, rows[:, 0], rows[:, 1], contexts=contexts, context_index=torch.arange(4),
            weight=[1.0, 2.0, 3.0, 4.0], probability=[1.0, 0.9, 0.8, 0.7], encoder={"name": "e"},
            candidates=[(i, rows[i], torch.arange(3.0)) for i in range(4)],
        )  # fmt: skip
    chosen, rejected = torch.randn(2, 7, 6, generator=generator)
    if kind == "plain":
        return EncodedPairs(chosen, rejected)
    return EncodedPairs(chosen, rejected, torch.randn(3, 2, generator=generator)[torch.arange(7) % 3])


@pytest.mark.parametrize("kind", ["table", "plain", "contexts"])
def test_pairs_come_back_from_disk_as_they_were(kind: str, tmp_path):
    pairs = stored_pairs(kind)
    again = EncodedPairs.load(pairs.save(tmp_path, dtype=torch.float32))
    assert again.event_shape == pairs.event_shape
    assert again.encoder == pairs.encoder
    for name in ("chosen", "rejected", "context", "weight", "probability", "group", "pool"):
        ours, theirs = getattr(pairs, name), getattr(again, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert torch.equal(ours, theirs), name
    assert (again.candidates is None) == (pairs.candidates is None)
    for ours, theirs in zip(pairs.candidates or [], again.candidates or [], strict=True):
        assert ours.context_index == theirs.context_index
        assert torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.scores, theirs.scores)


def test_float16_on_disk_is_half_the_size_and_nearly_the_same(tmp_path):
    pairs = stored_pairs("plain")
    again = EncodedPairs.load(pairs.save(tmp_path / "half"))
    torch.testing.assert_close(again.gather(torch.arange(7)).chosen, pairs.chosen, rtol=1e-3, atol=1e-3)
    pairs.save(tmp_path / "whole", dtype=torch.float32)
    sizes = [(tmp_path / name / "outputs.npy").stat().st_size - 128 for name in ("half", "whole")]
    assert sizes[0] * 2 == sizes[1]
    with pytest.raises(ValueError, match="outputs holds values up to 100000, beyond float16"):
        EncodedPairs(torch.full((2, 3), 1e5), torch.zeros(2, 3)).save(tmp_path / "large")
    with pytest.raises(FileNotFoundError, match=r"holds no pairs\.json: give a folder that EncodedPairs.save has"):
        EncodedPairs.load(tmp_path / "large")


def test_arrays_on_disk_are_taken_without_a_copy(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "chosen.npy", mode="w+", dtype=np.float16, shape=(5, 4))
    array[:] = 1
    pairs = EncodedPairs(array, np.zeros((5, 4), dtype=np.float16))
    array[2] = 3
    assert float(pairs.gather(torch.tensor([2])).chosen.mean()) == 3.0


def test_contexts_that_differ_by_rounding_are_one_prompt():
    contexts = torch.randn(30, 16, generator=torch.Generator().manual_seed(3))
    again = contexts + 2e-7 * torch.randn(30, 16, generator=torch.Generator().manual_seed(4))
    contexts[0], again[0] = 0.0, -0.0
    y, other = torch.randn(2, 60, 3)
    pairs = EncodedPairs(y, other, torch.cat([contexts, again]))
    assert len(pairs.group.unique()) == 30
    assert torch.equal(pairs.group[:30], pairs.group[30:])
    assert torch.equal(pairs.pool[:30], pairs.pool[30:])
    train, held = pairs.split(0.3, seed=1)
    assert not set(train.group.tolist()) & set(held.group.tolist())


def test_small_steps_do_not_chain_contexts_together():
    line = torch.linspace(0, 1, 50_000)[:, None]
    numbers = same_rows(line)
    assert len(numbers.unique()) > 20_000
    assert len(same_rows(torch.eye(40)).unique()) == 40
    assert same_rows(torch.tensor([[1.0], [2.0], [1.0]])).tolist() == [0, 1, 0]


def test_swapped_pairs_have_their_candidates_in_the_opposite_order():
    scores = torch.tensor([0.1, 0.7, -0.3, 2.0])
    pairs = EncodedPairs.from_table(
        torch.randn(4, 2), [3, 1], [0, 2], group=[0, 0], candidates=[(0, torch.arange(4), scores)]
    )
    swapped = pairs.swap()
    assert swapped.candidates is not None
    assert swapped.candidates[0].scores.tolist() == (-scores).tolist()
    assert swapped.candidates[0].rows.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(swapped.chosen, pairs.rejected)
    again = swapped.swap().candidates
    assert again is not None
    assert again[0].scores.tolist() == scores.tolist()


def test_pairs_with_a_preferred_side_are_told_from_ties():
    y, other = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    assert EncodedPairs(y, other).decided.tolist() == [True] * 3
    assert EncodedPairs(y, other, probability=[1.0, 0.5, 0.2]).decided.tolist() == [True, False, True]
    assert EncodedPairs(y, other, probability=[0.5] * 3).decided.tolist() == [True] * 3  # else nothing would be left
