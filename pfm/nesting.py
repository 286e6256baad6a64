"""JSON from outside, refused where its lists and objects nest deeper than any data does.

A parser that calls itself meets Python's recursion limit on ``[[[[…``. The error can be caught, but whatever else runs
at that depth (a finalizer, a logging call) fails with it, so the depth is counted before the parser starts.
"""

import json
import re
from typing import Any

MAX_NESTING = 200
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]+|\\.)*"?|[\[\]{}]', re.DOTALL)


def parse_json(content: str | bytes) -> Any:
    """Return the value that JSON text holds.

    Args:
        content: the text; bytes are UTF-8, UTF-16 or UTF-32, told apart as `json.loads` does.

    Raises:
        ValueError: not valid JSON, or nested deeper than 200; a UnicodeDecodeError where the bytes are no text.
    """
    if isinstance(content, bytes):
        content = content.decode(json.detect_encoding(content), "surrogatepass")
    if content.count("[") + content.count("{") > MAX_NESTING:
        depth = 0
        for found in _STRING_OR_BRACKET.finditer(content):
            character = found.group()[0]
            depth += (character in "[{") - (character in "]}")
            if depth > MAX_NESTING:
                raise ValueError(f"nested deeper than {MAX_NESTING} at character {found.start()}")
    return json.loads(content)
