"""The argument checks: what they take, what they refuse, and that a message names argument, wanted and given."""

import math
import re
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch

import pfm
from pfm._internal import checks


@pytest.mark.parametrize("value", [1, 5, np.int64(3), np.uint8(4)])
def test_whole_numbers_are_returned_as_plain_ints(value):
    found = checks.check_whole("n", value, 1, 5)
    assert type(found) is int
    assert found == value


@pytest.mark.parametrize(
    "value", [0, 6, True, 2.0, np.float64(2), "3", None, math.nan, [2], torch.tensor(2.0), "٣", 10**400]
)
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(ValueError, match=r"^n must be a whole number from 1 to 5: got ") as caught:
        checks.check_whole("n", value, 1, 5)
    assert len(str(caught.value)) < 130


@pytest.mark.parametrize(
    ("limits", "good", "bad", "text"),
    [
        ({"least": 0}, [0, 1e300], [-1e-300, math.inf, math.nan], "be a number of at least 0"),
        ({"above": 0}, [5e-324, 2], [0, -0.0], "be a positive number"),
        ({"least": 0, "most": 1}, [0, 1, 0.5], [-1e-9, 1 + 1e-9], r"lie in \[0, 1\]"),
        ({"above": 0, "below": 1}, [0.5], [0, 1], "lie between 0 and 1"),
        ({"least": 0, "below": 1}, [0], [1], r"lie in \[0, 1\)"),
        ({"above": 0, "most": 1}, [1], [0], r"lie in \(0, 1\]"),
        ({}, [-7, 0.0], [math.inf, -math.inf, math.nan], "be a finite number"),
        ({"above": 2}, [3], [2], "be a number above 2"),
        ({"below": 2}, [1], [2], "be a number below 2"),
        ({"most": 2}, [2], [3], "be a number of at most 2"),
    ],
)
def test_ranges_include_what_they_say(limits, good, bad, text):
    for value in good:
        assert checks.check_number("x", value, **limits) == value
        assert checks.check_number("x", np.float64(value), **limits) == value
    for value in [*bad, True, "0.5", None, object(), [0.5, 0.6], 1j, torch.ones(2), 10**400]:
        with pytest.raises(ValueError, match=f"^x must {text}: got "):
            checks.check_number("x", value, **limits)


def test_tensors_and_arrays_of_one_number_are_numbers():
    for value in (torch.tensor(0.5), np.float32(0.5), np.array(0.5)):
        found = checks.check_number("x", value, least=0, most=1)
        assert isinstance(found, float)
        assert found == 0.5


def test_other_values_are_allowed_by_name_only():
    assert checks.check_whole("steps", "auto", 1, also=("auto",)) == "auto"
    assert checks.check_number("noise", None, above=0, also=(None,)) is None
    assert checks.check_number("beta", math.inf, above=0, also=(math.inf,)) == math.inf
    for value in ("Auto", None, np.array(["auto", "auto"])):
        with pytest.raises(ValueError, match=r"steps must be a whole number of at least 1, or 'auto': got "):
            checks.check_whole("steps", value, 1, also=("auto",))


def test_flags_choices_and_lengths():
    checks.check_flag("linear", False)
    for value in (0, 1, "true", None, np.bool_(True)):
        with pytest.raises(ValueError, match=r"linear must be true or false: got "):
            checks.check_flag("linear", value)
    checks.check_choice("by", "b", ("a", "b"))
    checks.check_choice("by", np.str_("b"), ("a", "b"))
    for value in ("B", "", None, True, 0, ["a"], {"a"}, np.array(["a", "b"]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"by must be one of a, b: got "):
            checks.check_choice("by", value, ("a", "b"))
    with pytest.raises(ValueError, match=r"by must be one of 0, 1: got True"):
        checks.check_choice("by", True, (0, 1))
    checks.check_length("names", ("a",), 1, "taste")
    with pytest.raises(ValueError, match=r"names must have one entry a taste: got 0 for 1 taste$"):
        checks.check_length("names", (), 1, "taste")
    with pytest.raises(ValueError, match=r"weights must have one entry an encoder: got 3 for 2 encoders$"):
        checks.check_length("weights", "abc", 2, "encoder")


@pytest.mark.parametrize("array", [torch.zeros(2, 3), np.zeros((2, 3))])
def test_shapes(array):
    for fits in ((2, 3), (2, "C"), ("N", "*D"), ("N", "C")):
        checks.check_shape("y", array, fits)
    for wanted in ((3, 2), (2,), ("N", "C", "*D"), (2, 3, "D")):
        text = re.escape(f"y must be {str(wanted).replace(chr(39), '')}, rows of pairs: got (2, 3); transpose it")
        with pytest.raises(ValueError, match=text):
            checks.check_shape("y", array, wanted, "rows of pairs", hint="transpose it")


def test_the_first_row_that_is_not_finite_is_named():
    rows = np.arange(20_000.0).reshape(10_000, 2)
    frozen = rows.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (rows, frozen, rows.astype(int), np.zeros((0, 2)), np.array(1.0), torch.zeros(0), torch.tensor(1)):
            checks.check_finite("y", fine)
    checks.check_finite("y", torch.full((3, 2), 3e38))  # their sum is beyond float32
    rows[9_000, 1], rows[9_500, 0] = np.nan, np.inf
    for bad in (rows, torch.from_numpy(rows), torch.from_numpy(rows).half(), rows[:, None]):
        with pytest.raises(
            ValueError, match="y must be finite: 2 of 10000 rows hold NaN or infinity, the first is row 9000"
        ):
            checks.check_finite("y", bad)


@pytest.mark.parametrize(
    "kept",
    [
        lambda array: array[::-1, ::-1][::-1, ::-1],
        lambda array: np.flip(np.flip(array, 1).copy(), 1),
        lambda array: array.astype(">f4"),
        lambda array: array.astype(">i2"),
        lambda array: array.astype(np.longdouble),
        lambda array: np.ma.masked_array(array, mask=False),
        np.asfortranarray,
    ],
)
def test_arrays_in_any_layout_and_byte_order_hold_the_same_numbers(kept):
    array = np.arange(6.0).reshape(3, 2)
    found = checks.as_float_tensor("y", kept(array))
    assert torch.equal(found.double(), torch.from_numpy(array))


def test_arrays_that_are_read_only_are_taken_without_a_warning(tmp_path):
    np.save(tmp_path / "y.npy", np.ones((2, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checks.as_float_tensor("y", np.load(tmp_path / "y.npy", mmap_mode="r"))
    assert torch.equal(found, torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.ma.masked_array([1.0, 2.0], mask=[True, False]), "1 of whose values are missing"),
        (torch.eye(2).to_sparse(), r"torch\.sparse_coo; pass y\.to_dense\(\)"),
        (scipy.sparse.eye(2, format="csr"), r"the sparse \w+; pass y\.toarray\(\)"),
        (np.array([[1, None]], dtype=object), "an array of object"),
        (np.array(["a"]), "an array of <U1"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "an array of datetime64"),
    ],
)
def test_what_holds_no_dense_numbers_is_refused_with_its_kind(value, said):
    with pytest.raises(TypeError, match=f"^y must be a tensor or an array of numbers: got .*{said}"):
        checks.as_float_tensor("y", value)


def test_an_index_may_be_a_reversed_array():
    found = checks.checked_index("index", np.arange(3)[::-1], torch.zeros(3, 1))
    assert found.tolist() == [2, 1, 0]


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, None, "1", True])
def test_a_seed_that_numpy_or_torch_refuses_is_refused_before_the_work(seed):
    pairs = pfm.EncodedPairs(torch.ones(4, 1), torch.zeros(4, 1))
    rows = pfm.PreferencePairs.from_rows([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    calls = [
        lambda: pfm.FlowConfig(seed=seed),
        lambda: pairs.split(seed=seed),
        lambda: pairs.flip_labels(0.1, seed=seed),
        lambda: rows.split(seed=seed),
        lambda: rows.shuffle_labels(seed=seed),
        lambda: pfm.PreferencePairs.from_scores(["p"], [["a", "b"]], [[0, 1]], seed=seed),
        lambda: pfm.evaluate([], seed=seed),
        lambda: pfm.preferences.BradleyTerry(seed=seed),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^seed must be a whole number from 0 to 9223372036854775807: got "):
            call()
