"""CSV as spreadsheets and other programs write it: which character separates cells, and which columns are none.

Read are commas, semicolons (Excel where the comma is the decimal mark), tabs and bars, a first line ``sep=;`` (Excel),
UTF-16 and UTF-32 with a byte order mark (Excel's "Unicode Text"), an index column without a name (pandas, R), empty
columns and rows at the ends, and a space after each separator.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pfm.data.conversations import is_unicode
from pfm.data.errors import BadRows, PreferenceDataError, not_utf8

__all__ = ["LONGEST_MARK", "TableRow", "check_is_text", "decode_text", "table_rows"]

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SEPARATOR_LINE = re.compile(r'\s*"?sep=(.)"?[,;\t| ]*(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
_BYTE_ORDER_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TableRow(int):
    """The number of a row, from 1 after the header, which also says at which line of the file the row begins.

    >>> f"row {TableRow.at(6, 7)}"
    'row 6 (line 7)'
    """

    line: int

    @classmethod
    def at(cls, number: int, line: int) -> TableRow:
        """Make the number of a row that begins at this line, from 1."""
        row = cls(number)
        row.line = line
        return row

    def __str__(self) -> str:
        return f"{int(self)} (line {self.line})"


def table_rows(raw: bytes, bad: BadRows) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield (:class:`TableRow` from 1 after the header, cells by column) of the bytes of a CSV file.

    An empty cell is None. Rows whose cells are all empty are skipped and not counted.

    Raises:
        PreferenceDataError: the bytes are no text, the header is bad, or a row is and bad rows are raised.
    """
    text = decode_text(raw, bad)
    declared = _SEPARATOR_LINE.match(text)
    before = declared[0].count("\n") or declared[0].count("\r") if declared else 0
    text = text[declared.end() :] if declared else text
    separator = declared[1] if declared else _likeliest_separator(text)
    usual_limit = csv.field_size_limit(2**31 - 1)
    try:
        spaced = all(name.startswith(" ") for name in _first_rows(text, separator)[0][1:]) if text.strip() else False
        # strict: otherwise a quote that is never closed swallows the rest of the file without a word
        options: dict[str, Any] = {"delimiter": separator, "skipinitialspace": spaced, "strict": True}
        yield from _rows(csv.reader(io.StringIO(text, newline=""), **options), separator, bad, before)
    finally:
        csv.field_size_limit(usual_limit)


#: How files that are no text begin, and what to do with them.
_OTHER_KINDS = {
    b"PK\x03\x04": "the file is an Excel or OpenDocument workbook; save the sheet as CSV in UTF-8",
    b"\x1f\x8b": "the file is compressed by gzip; let its name end in .gz",
    b"BZh": "the file is compressed by bzip2; let its name end in .bz2",
    b"\xfd7zXZ\x00": "the file is compressed by xz; let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "the file is compressed by Zstandard; decompress it by zstd -d",
    b"PAR1": "the file is Parquet; let its name end in .parquet",
    b"ARROW1": "the file is Arrow; read it by datasets.Dataset.from_file and pass it to from_dataset",
}
LONGEST_MARK = 6


def check_is_text(beginning: bytes, bad: BadRows) -> str | None:
    """Return the encoding that the byte order mark of a file says, or None without a mark.

    Args:
        beginning: its first bytes, at least ``LONGEST_MARK`` where it has as many.
        bad: names the file in messages.

    Raises:
        PreferenceDataError: it is another kind of file.
    """
    for start, problem in _OTHER_KINDS.items():
        if beginning.startswith(start):
            raise PreferenceDataError(problem, reason="no text", source=bad.source)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if beginning.startswith(mark)), None)
    if encoding is None and b"\0" in beginning[:1000]:
        raise PreferenceDataError(
            "the file begins with NUL bytes between its characters, as UTF-16 without a byte order mark does; save the "
            "text as UTF-8",
            reason="invalid UTF-8",
            source=bad.source,
        )
    return encoding


def decode_text(raw: bytes, bad: BadRows) -> str:
    """Decode the bytes of a text file: UTF-8, or what a byte order mark says.

    Raises:
        PreferenceDataError: it is another kind of file, or not valid in its encoding.
    """
    encoding = check_is_text(raw, bad)
    if encoding is not None:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            raise PreferenceDataError(
                f"not valid {encoding.upper()}, which its byte order mark says it is: {error.reason} at byte offset "
                f"{error.start}; save the text as UTF-8",
                reason="invalid Unicode",
                source=bad.source,
            ) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if bad.raises:
            line = raw.count(b"\n", 0, error.start) + 1
            raise not_utf8(error, row=f"line {line}", source=bad.source) from None
        return raw.decode("utf-8-sig", errors="surrogateescape")  # the rows concerned are dropped one by one


def _first_rows(text: str, separator: str) -> list[list[str]]:
    """Return the header and the first row, as far as they can be read."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    found: list[list[str]] = []
    try:
        for cells in rows:
            found += [cells] if any(cells) else []
            if len(found) == 2:
                break
    except csv.Error:
        pass
    return found


def _likeliest_separator(text: str) -> str:
    """Return the separator that cuts the header into the most cells, the first row into as many if any does."""

    def fit(separator: str) -> tuple[bool, int]:
        counts = [len(cells) for cells in _first_rows(text, separator)]
        return len(set(counts)) == 1 and counts[0] > 1, counts[0] if counts else 0

    return max(_SEPARATORS, key=fit)


def _rows(reader: Any, separator: str, bad: BadRows, before: int) -> Iterator[tuple[int, dict[str, str | None]]]:
    header = _header(reader, bad)
    width = max((place + 1 for place, name in enumerate(header) if name), default=0)
    number = 0
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            number += 1
            if len(cells) < width or any(cell.strip() for cell in cells[len(header) :]):
                raise PreferenceDataError(
                    f"got {len(cells)} cells; expected {len(header)} as in the header, quotes around "
                    f"{_SEPARATORS.get(separator, repr(separator))}",
                    reason="wrong number of columns",
                )
            if not is_unicode("".join(cells)):
                raise PreferenceDataError("not valid UTF-8", reason="invalid UTF-8")
            for place, name in enumerate(header):
                # The first column without a name numbers the rows.
                if place and not name and place < len(cells) and cells[place].strip():
                    raise PreferenceDataError(
                        f"cell {place + 1} holds {cells[place]!r}, and its column has no name; name it in the header, "
                        f"or put quotes around {_SEPARATORS.get(separator, repr(separator))} in texts",
                        reason="column without a name",
                    )
            yield (
                TableRow.at(number, line),
                {name: cell or None for name, cell in zip(header, cells, strict=False) if name},
            )
        except csv.Error as error:
            number += 1
            problem = f"not valid CSV ({error}), found at line {before + reader.line_num}"
            bad.meet(PreferenceDataError(problem, reason="invalid CSV"), f"row {TableRow.at(number, line)}")
        except PreferenceDataError as error:
            bad.meet(error, f"row {TableRow.at(number, line)}")


def _header(reader: Any, bad: BadRows) -> list[str]:
    try:
        header: list[str] = next(([name.strip() for name in cells] for cells in reader if any(cells)), list[str]())
    except csv.Error as error:
        problem = f"the header is not valid CSV ({error})"
        raise PreferenceDataError(problem, reason="bad header", source=bad.source) from None
    named = [name for name in header if name]
    if len(set(named)) != len(named):
        twice = ", ".join(repr(name) for name, count in Counter(named).items() if count > 1)
        raise PreferenceDataError(
            f"the header names {twice} twice; expected distinct names", reason="bad header", source=bad.source
        )
    return header
