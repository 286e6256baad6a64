"""JSON from outside, refused where its lists and objects nest deeper than any data does.

A recursive parser reaches Python's recursion limit on ``[[[[…``. The error can be caught, but whatever else runs
at that depth (a finalizer, a logging call) fails with it, so the depth is counted before the parser starts.
"""

import json
from typing import Any

import numpy as np

MAX_NESTING = 200
_BLOCK = 2**18  # bytes counted at a time, so that counting takes little memory beside the text
_STEP = np.zeros(256, np.int32)  # change of depth, by byte
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_IS_QUOTE = np.zeros(256, np.int32)
_IS_QUOTE[ord('"')] = 1
_BEGINS_VALUE = np.zeros(256, bool)
_BEGINS_VALUE[list(b"[{,:")] = True


def parse_json(content: str | bytes, *, max_values: int | None = None) -> Any:
    """Return the value that JSON text holds.

    Args:
        content: the text; bytes are UTF-8, UTF-16 or UTF-32, detected as `json.loads` does.
        max_values: the most values, keys included, that it may hold; None for any number. A value of two
            characters takes about 60 bytes once parsed, so a bound on the length alone does not bound memory well.

    Raises:
        ValueError: not valid JSON, nested deeper than 200, or more than ``max_values`` values; a
            UnicodeDecodeError where the bytes are no text.
    """
    if isinstance(content, bytes):
        content = content.decode(json.detect_encoding(content), "surrogatepass")
    opened = content.count("[") + content.count("{")
    values = opened + content.count(",") + content.count(":")
    if opened > MAX_NESTING or (max_values is not None and values > max_values):
        _check_structure(content, max_values)
    return json.loads(content)


def _check_structure(content: str, max_values: int | None) -> None:
    """Count depth and values outside of strings, exactly as far as the text is valid JSON."""
    text = content.encode("utf-8", "surrogatepass")
    # Within a string of valid JSON, pairs of backslashes align from the left; what is left over escapes a quote.
    text = text.replace(rb"\\", b"__").replace(rb"\"", b"__")
    depth = in_string = values = 0
    for start in range(0, len(text), _BLOCK):
        block = np.frombuffer(text, np.uint8, min(_BLOCK, len(text) - start), start)
        outside = (in_string + np.cumsum(_IS_QUOTE[block])) % 2 == 0
        in_string = int(not outside[-1])
        depths = depth + np.cumsum(_STEP[block] * outside)
        depth = int(depths[-1])
        if depths.max() > MAX_NESTING:
            place = start + int(np.argmax(depths > MAX_NESTING))
            characters = len(text[:place].decode("utf-8", "surrogatepass"))
            raise ValueError(f"nested deeper than {MAX_NESTING} at character {characters}")
        values += int(np.count_nonzero(_BEGINS_VALUE[block] & outside))
        if max_values is not None and values > max_values:
            raise ValueError(f"more than {max_values} values")
