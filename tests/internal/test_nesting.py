"""JSON from outside: what `json.loads` reads is read alike, and depth is refused before the parser meets it."""

import json
import tracemalloc

import pytest

from pfm._internal.nesting import MAX_NESTING, parse_json


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "content",
    [
        nested(MAX_NESTING),
        '{"a": ' * 150 + "1" + "}" * 150,
        json.dumps(["[" * 5000, '"]' * 5000, "\\" * 51, '{\\"[']),  # brackets in text are no nesting
        json.dumps([[i] for i in range(5000)]),  # many lists side by side are no nesting
        json.dumps({"é": [1, None]}).encode("utf-16"),
    ],
)
def test_what_json_reads_is_read_alike(content):
    assert parse_json(content) == json.loads(content)


@pytest.mark.parametrize(
    "content", [nested(MAX_NESTING + 1), "[" * 100_000, b'{"a":' * 100_000, '["\\"", ' + nested(MAX_NESTING) + "]"]
)
def test_depth_is_refused_before_parsing(content):
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_NESTING} at character"):
        parse_json(content)


@pytest.mark.parametrize("content", ['["' + "[" * 500, '["\\', "[1,", "]" * 500 + "[" * 300, b"\xff"])
def test_what_is_no_json_stays_a_value_error(content):
    with pytest.raises(ValueError):
        parse_json(content)


@pytest.mark.parametrize(
    ("opening", "repeats", "offset"),
    [("[", 199, 0), ('{"é\\\\": [', 99, 8), ('["\\\\\\"[", ', 199, 0)],  # of the third, one bracket is in a string
)
def test_the_place_of_too_much_depth_is_named_across_blocks(opening, repeats, offset):
    padding = '["' + "é" * 300_000 + '", '
    place = len(padding) + repeats * len(opening) + offset
    with pytest.raises(ValueError, match=f"at character {place}$"):
        parse_json(padding + opening * (MAX_NESTING + 1))


def test_values_are_counted_outside_of_strings_only():
    assert parse_json('["a,b:[{", {"c": 1}]', max_values=6) == ["a,b:[{", {"c": 1}]
    with pytest.raises(ValueError, match="more than 4 values"):
        parse_json("[1,2,3,4,5,6]", max_values=4)


def test_counting_takes_memory_of_the_texts_own_order():
    content = "[" + "[]," * 1_000_000 + "1" + "]" * 300
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 1000 values"):
        parse_json(content, max_values=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * len(content)
