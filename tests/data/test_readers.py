"""Files and containers of rows: encodings, compression, damage, and what is no list of rows."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from pfm.data import PreferenceDataError, PreferencePairs

ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def texts(pairs: PreferencePairs) -> list[tuple[str, str, str]]:
    return list(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True))


MARKED = [
    ("utf-16", "pairs.jsonl"),
    ("utf-32", "pairs.jsonl"),
    ("utf-8-sig", "pairs.jsonl"),
    ("utf-16", "pairs.json"),
]


@pytest.mark.parametrize(("encoding", "name"), MARKED)
def test_a_byte_order_mark_says_the_encoding_of_json_too(tmp_path, encoding, name):
    rows = [{"prompt": f"Frage {n}", "chosen": "schön\u0a0a\u2028", "rejected": "übel"} for n in range(3)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path / name
    path.write_bytes((json.dumps(rows) if name.endswith(".json") else lines).encode(encoding))
    assert texts(PreferencePairs.from_file(path)) == [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def test_text_that_breaks_off_after_a_byte_order_mark_is_a_bad_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes((json.dumps(ROW) + "\n").encode("utf-16") + b"{")
    with pytest.raises(PreferenceDataError, match="line 2: not valid UTF-16"):
        PreferencePairs.from_jsonl(path)
    assert len(PreferencePairs.from_jsonl(path, on_bad_rows="drop")) == 1


@pytest.mark.parametrize("opener", [gzip.open, lzma.open, bz2.open])
def test_compressed_files_are_read_or_named_by_what_they_are(tmp_path, opener):
    suffix = {gzip.open: ".gz", lzma.open: ".xz", bz2.open: ".bz2"}[opener]
    for name in ("pairs.jsonl", "pairs.json"):
        content = json.dumps(ROW if name.endswith("l") else [ROW]).encode()
        with opener(tmp_path / f"{name}{suffix}", "wb") as file:
            file.write(content)
        assert len(PreferencePairs.from_file(tmp_path / f"{name}{suffix}")) == 1
        (tmp_path / f"{name}{suffix}").rename(tmp_path / name)
        with pytest.raises(PreferenceDataError, match=rf"compressed by \w+; let its name end in {suffix}"):
            PreferencePairs.from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}", "not valid JSON"),
        (json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) * 2, "not valid JSON"),
        ('{"prompt": "p", "weight": ' + "9" * 5000 + "}", "not valid JSON"),
        (json.dumps([{"prompt": "p"}], indent=1), "over several lines: rename it to .json"),
        (json.dumps({"prompt": "p"}, indent=1), "over several lines: rename it to .json"),
        ('{"prompt": "p", "chosen": "a', "cut short"),
        ('{"prompt": "p", "chosen": "a\\', "cut short"),
        ('{"prompt": "p", "chosen"', "cut short"),
        ('{"prompt": "p", "weight": nul', "cut short"),
        ('{\0"\0p\0', "NUL bytes"),
    ],
)
def test_only_what_ends_too_early_is_called_cut_short(tmp_path, content, said):
    with pytest.raises(PreferenceDataError) as caught:
        PreferencePairs.from_jsonl(write(tmp_path / "rows.jsonl", content))
    assert said in str(caught.value)
    assert ("cut short" in str(caught.value)) == (said == "cut short")


def test_numbers_beyond_a_float_are_bad_rows():
    huge = 10**400
    with pytest.raises(PreferenceDataError, match=r"column 'weight': got int 1000.*; expected a finite number"):
        PreferencePairs.from_rows([{**ROW, "weight": huge}])
    with pytest.raises(PreferenceDataError, match=r"candidates\[0\]\[1\].*the score is inf; expected a finite"):
        PreferencePairs.from_scores(["p"], [["a", "b"]], [[1, huge]])
    completions = [{"response": "a", "score": huge}, {"response": "b", "score": 1}]
    with pytest.raises(PreferenceDataError, match="no score in common"):
        PreferencePairs.from_rows([{"instruction": "p", "completions": completions}])


def test_a_table_with_a_name_twice_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    names = ["prompt", "chosen", "chosen", "rejected"]
    table = pyarrow.Table.from_arrays([pyarrow.array([name]) for name in "pabc"], names=names)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(PreferenceDataError, match="names 'chosen' twice"):
        PreferencePairs.from_parquet(tmp_path / "rows.parquet")


def test_invisible_characters_in_a_columns_name_lose_no_prompt():
    pairs = PreferencePairs.from_rows([{"\ufeffprompt": "p", "chosen\u200b": "a", "rejected\xa0": "b"}])
    assert texts(pairs) == [("p", "a", "b")]


@pytest.mark.parametrize(
    ("rows", "way_out"),
    [
        ("rows.jsonl", "for a path use from_file"),
        (Path("rows.jsonl"), "for a path use from_file"),
        ({"prompt": ["p"], "chosen": ["a"]}, "for columns "),
        (3, ""),
    ],
)
def test_what_is_no_list_of_rows_is_refused_with_the_way_out(rows, way_out):
    with pytest.raises(TypeError, match=f"^rows must be a list of dictionaries: got .*{way_out}"):
        PreferencePairs.from_rows(rows)


def test_tables_of_other_libraries_are_refused_with_the_call_that_makes_rows():
    import datasets
    import pandas
    import pyarrow

    split: Any = datasets.Dataset.from_list([ROW])
    assert len(PreferencePairs.from_rows(split)) == 1
    tables: list[tuple[Any, str]] = [
        (datasets.DatasetDict({"test": split}), r"its splits, as in rows\['test'\]"),
        (pandas.DataFrame([ROW]), r"pass rows\.to_dict\('records'\)"),
        (pyarrow.table({"prompt": ["p"]}), r"pass rows\.to_pylist\(\)"),
    ]
    for rows, way_out in tables:
        with pytest.raises(TypeError, match=f"(?s)^rows must be a list of dictionaries: got .*{way_out}"):
            PreferencePairs.from_rows(rows)


def test_files_are_found_and_written_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    PreferencePairs.from_rows([ROW]).to_jsonl("~/rows.jsonl")
    assert (tmp_path / "rows.jsonl").exists()
    assert len(PreferencePairs.from_file("~/rows.jsonl")) == 1
