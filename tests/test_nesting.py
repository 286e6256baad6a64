"""JSON from outside: what `json.loads` reads is read alike, and depth is refused before the parser meets it."""

import json

import pytest

from pfm.nesting import MAX_NESTING, parse_json


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
