"""Files of rows: read JSON lines, JSON, tables of text, Parquet and datasets row by row, and write lines."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from pfm._internal.nesting import parse_json
from pfm.data.errors import BadRows, PreferenceDataError, not_utf8, show
from pfm.data.labels import class_name, class_names
from pfm.data.spreadsheets import LONGEST_MARK, check_is_text, decode_text, table_rows

__all__ = [
    "NumberedRows",
    "json_value",
    "numbered_rows",
    "open_binary",
    "read_csv",
    "read_dataset",
    "read_json",
    "read_jsonl",
    "read_parquet",
    "reader_for",
    "without_compression",
    "write_lines",
]

NumberedRows: TypeAlias = Iterable[tuple[int, Any]]

_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def open_binary(path: Path, mode: str = "rb") -> IO[bytes]:
    """Open a file of bytes, through gzip, xz or bzip2 when its name ends in ``.gz``, ``.xz`` or ``.bz2``."""
    return cast(IO[bytes], _OPENERS.get(path.suffix.lower(), open)(path, mode))


def without_compression(path: Path) -> Path:
    """Return the path without the suffix of a compression.

    >>> without_compression(Path("pairs.jsonl.gz")).name, without_compression(Path("pairs.csv")).name
    ('pairs.jsonl', 'pairs.csv')
    """
    return path.with_suffix("") if path.suffix.lower() in _OPENERS else path


def read_jsonl(path: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of each line that is not blank."""
    number, offset = 0, 0
    with open_binary(path) as file:
        lines = _lines(file, bad)
        while True:
            number += 1
            try:
                line = next(lines, None)
            except _DAMAGE as error:
                bad.meet(_damaged(error), f"line {number}")
                return
            except UnicodeDecodeError as error:
                problem = f"not valid {error.encoding.upper()}, which its byte order mark says it is: {error.reason}"
                bad.meet(PreferenceDataError(problem, reason="invalid Unicode"), f"line {number}")
                return
            if line is None:
                return
            if not line.isspace():
                try:
                    yield number, _parse_line(line, number, offset)
                except PreferenceDataError as error:
                    bad.meet(error, f"line {number}")
            offset += len(line)


def _lines(file: IO[bytes], bad: BadRows) -> Iterator[bytes]:
    """Yield the lines of a file of text as UTF-8; a byte order mark may say that the file is UTF-16 or UTF-32."""
    beginning = file.read(LONGEST_MARK)
    file.seek(0)
    encoding = check_is_text(beginning, bad)
    if encoding is None:
        yield from file
        return
    for line in io.TextIOWrapper(file, encoding, newline="\n"):
        yield line.encode("utf-8", "surrogatepass")


def _parse_line(line: bytes, number: int, offset: int) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(error, offset) from None
    except ValueError as error:
        if line.endswith(b"\n") or not _is_cut_short(error):
            spread = number == 1 and line.strip() in _OPENINGS
            hint = "; the file holds one JSON value over several lines: rename it to .json or use from_json" * spread
            raise PreferenceDataError(
                f"not valid JSON ({error}); expected one JSON object a line{hint}", reason="invalid JSON"
            ) from None
        raise PreferenceDataError(
            f"the last line is cut short ({error}); the file was probably not written to its end",
            reason="truncated last line",
        ) from None


_OPENINGS = (b"[", b"[{", b"{")  # first lines of JSON that is written over several
_ENDINGS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


def _is_cut_short(error: ValueError) -> bool:
    """Tell JSON that ends too early from text that is wrong before its end."""
    if not isinstance(error, json.JSONDecodeError) or error.msg == "Extra data":
        return False
    rest = error.doc[error.pos :].strip()
    in_string = error.msg.startswith(("Unterminated string", "Invalid \\"))
    return not rest or in_string or any(word.startswith(rest) for word in _ENDINGS)


def read_json(path: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, value) of a file that holds one JSON array."""
    raw = _read_all(path, bad)
    try:
        rows = parse_json(decode_text(raw, bad))
    except PreferenceDataError:
        raise
    except ValueError as error:
        hint = (
            "; the file holds one object a line: rename it to .jsonl or use from_jsonl"
            if str(error).startswith("Extra data")
            else ""
        )
        raise PreferenceDataError(f"not valid JSON ({error}){hint}", reason="invalid JSON", source=bad.source) from None
    if not isinstance(rows, list):
        raise PreferenceDataError(
            f"got {show(rows)}; expected a JSON array of row objects", reason="wrong type", source=bad.source
        )
    yield from enumerate(rows, 1)


def read_csv(path: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1 after the header, dict) of a table of text with a header (:mod:`pfm.data.spreadsheets`).

    Empty cells are null. In messages a number also names the line of the file at which the row begins.
    """
    yield from table_rows(_read_all(path, bad), bad)


def read_parquet(path: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, dict) of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('reading Parquet files needs pyarrow: pip install "preference-flow[parquet]"') from error
    number = 0
    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            _check_distinct(table.schema_arrow.names, bad.source)
            classes = class_names(_features(table.schema_arrow.metadata))
            for batch in table.iter_batches(batch_size=4096):
                for row in _arrow_rows(batch):
                    number += 1
                    if isinstance(row, PreferenceDataError):
                        bad.meet(row, f"row {number}")
                    else:
                        yield number, _with_class_names(row, classes)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise PreferenceDataError(
            f"not a readable Parquet file ({error})", reason="damaged file", source=bad.source
        ) from None


def _check_distinct(names: Sequence[str], source: str) -> None:
    """Refuse a table two of whose columns have one name: a row would hold the last of them without a word."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        problem = f"the table names {twice!r} twice; expected distinct names"
        raise PreferenceDataError(problem, reason="bad header", source=source)


def _features(metadata: Mapping[bytes, bytes] | None) -> Any:
    """Return what ``datasets`` writes beside a table about its columns."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return None


def _with_class_names(row: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return row | {column: class_name(names, row.get(column)) for column, names in classes.items() if column in row}


def _arrow_rows(batch: Any) -> Iterator[dict[str, Any] | PreferenceDataError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for position in range(batch.num_rows):
            try:
                yield from batch.slice(position, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield not_utf8(error)


def read_dataset(dataset: Any) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, dict) of a ``datasets.Dataset`` or ``IterableDataset``."""
    if isinstance(dataset, Mapping):
        raise PreferenceDataError(
            f"got a dictionary with the splits {', '.join(map(repr, dataset))}; "
            'expected one split, as in dataset["train"]',
            reason="wrong type",
            source="dataset",
        )
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "iter"):
        raise TypeError(f"dataset must be a datasets.Dataset: got {type(dataset).__name__}; use from_rows for a list")
    number = 0
    classes = class_names(getattr(dataset, "features", None))
    for batch in dataset.with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, _with_class_names(dict(zip(batch, values, strict=True)), classes)


FILE_READERS: dict[str, Callable[[Path, BadRows], Iterator[tuple[int, Any]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def reader_for(path: Path) -> Callable[[Path, BadRows], Iterator[tuple[int, Any]]]:
    """Find the reader by the suffix that is left without that of a compression."""
    try:
        return FILE_READERS[without_compression(path).suffix.lower()]
    except KeyError:
        raise ValueError(
            f"cannot tell the format of {path} by its name; expected one of {', '.join(FILE_READERS)} "
            "(.gz, .xz or .bz2 may follow), or call from_jsonl, from_json, from_csv, from_parquet"
        ) from None


def _read_all(path: Path, bad: BadRows) -> bytes:
    try:
        with open_binary(path) as file:
            raw = file.read()
    except _DAMAGE as error:
        damage = _damaged(error)
        damage.source = bad.source
        raise damage from None
    if not raw.strip():
        raise PreferenceDataError("the file is empty", reason="empty file", source=bad.source)
    return raw


def _damaged(error: Exception) -> PreferenceDataError:
    return PreferenceDataError(
        f"the compressed file is damaged or cut short ({error or type(error).__name__})",
        reason="damaged file",
    )


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write lines as UTF-8, atomically."""
    target = Path(path).expanduser()
    # the suffix stays last, as it decides about compression
    temporary = target.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.{target.name}")
    try:
        with open_binary(temporary, "wb") as file:
            for line in lines:
                file.write(line.encode() + b"\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def numbered_rows(rows: Iterable[Mapping[str, Any]]) -> NumberedRows:
    """Number rows from 1.

    Raises:
        TypeError: they are no list of dictionaries.
    """
    way_out = ""
    if isinstance(rows, str | bytes | os.PathLike):
        way_out = "; for a path use from_file"
    elif isinstance(rows, Mapping) and all(hasattr(split, "features") for split in rows.values()) and rows:
        way_out = f"; pass one of its splits, as in rows[{next(iter(rows))!r}]"
    elif isinstance(rows, Mapping):
        way_out = "; for one row pass [row], for columns [dict(zip(rows, row)) for row in zip(*rows.values())]"
    elif hasattr(rows, "to_pylist"):  # tables of Arrow, which yield their columns
        way_out = "; pass rows.to_pylist()"
    elif hasattr(rows, "to_dicts"):  # polars
        way_out = "; pass rows.to_dicts()"
    elif type(rows).__name__ == "DataFrame":  # pandas, which yields the names of its columns
        way_out = "; pass rows.to_dict('records')"
    elif not isinstance(rows, Iterable):
        way_out = "; for a path use from_file"
    if way_out:
        raise TypeError(f"rows must be a list of dictionaries: got {show(rows)}{way_out}")
    return enumerate(rows, 1)


def json_value(value: Any) -> Any:
    """Return the plain form of numpy values and of dates, which tables of other libraries hold."""
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"cannot write {show(value)} as JSON; remove or convert the column that holds it")
