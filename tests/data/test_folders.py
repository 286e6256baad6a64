"""Files of rows encoded one by one, and pairs on disk that are larger than the memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import pfm
from pfm.data.folders import row_files
from pfm.encoders import SurfaceEncoder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row(prompt: str, part: int, **more) -> dict:
    return {"prompt": prompt, "chosen": f"Yes, {part} times!", "rejected": f"no {part} {len(prompt)}", **more}


ROWS = [
    [row("Tea?", 0), row("Milk?", 0), row("Größe?", 0)],
    [row("tea? ", 1, weight=2.0), row("Sugar?", 1, weight=0.5)],  # a prompt of the first file, spelled another way
    [row("Milk?", 2)],
]


@pytest.fixture
def folder(tmp_path) -> Path:
    for part, rows in enumerate(ROWS):
        write_rows(tmp_path / "rows" / f"part-{part}.jsonl", rows)
    (tmp_path / "rows" / "_SUCCESS").touch()
    (tmp_path / "rows" / ".part-9.jsonl").write_text("{")
    return tmp_path / "rows"


@pytest.mark.parametrize("context", [True, False])
def test_files_one_by_one_are_the_pairs_of_all_rows(folder, context):
    found = pfm.encode_files(
        folder, SurfaceEncoder(), folder.parent / "pairs", dtype=torch.float32, context=context, progress=False
    )
    rows = pfm.PreferencePairs.from_rows([row for part in ROWS for row in part])
    wanted = rows.encode(SurfaceEncoder(), context=context, progress=False)
    every = torch.arange(len(wanted))
    for ours, theirs in zip(vars(found.gather(every)).values(), vars(wanted.gather(every)).values(), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert found.probability is None  # a column of ones would double the training rows
    assert torch.equal(_first_of(found.group), _first_of(wanted.group))
    assert found.encoder == wanted.encoder
    assert (found.pool.unique().numel(), found.group.unique().numel()) == (5 if context else 4, 4)


def _first_of(group: torch.Tensor) -> torch.Tensor:
    return (group[:, None] == group).int().argmax(1)


def test_a_bad_file_leaves_what_was_there(folder):
    pairs = folder.parent / "pairs"
    pfm.encode_files(folder, SurfaceEncoder(), pairs, progress=False)
    before = {path.name: path.read_bytes() for path in pairs.iterdir()}
    (folder / "part-1.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(pfm.PreferenceDataError, match=r"part-1\.jsonl"):
        pfm.encode_files(folder, SurfaceEncoder(), pairs, progress=False)
    assert {path.name: path.read_bytes() for path in pairs.iterdir()} == before
    found = pfm.encode_files(sorted(folder.glob("part-[02]*")), SurfaceEncoder(), pairs, progress=False)
    assert len(found) == 4


def test_files_are_named_by_a_folder_or_one_by_one(folder):
    assert [path.name for path in row_files(folder)] == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]
    assert row_files(str(folder / "part-1.jsonl")) == [folder / "part-1.jsonl"]
    with pytest.raises(FileNotFoundError, match="is no file"):
        row_files([folder / "part-7.jsonl"])
    with pytest.raises(ValueError, match="at least one file"):
        row_files([])
    (folder.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no file of rows: expected names that end in \.jsonl"):
        row_files(folder.parent / "empty")


def test_pairs_larger_than_the_memory_are_mapped_and_fitted_on(tmp_path):
    dimension, count = 64, 2000
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = 3 * memory // (2 * dimension) // 2
    try:  # a file with holes: it takes the place of the rows that are written
        table = np.lib.format.open_memmap(tmp_path / "outputs.npy", "w+", np.float16, (rows, dimension))
    except OSError as error:
        pytest.skip(f"no file of {rows * dimension * 2:,} bytes with holes can be made here: {error}")
    places = torch.linspace(0, rows - 1, 2 * count, dtype=torch.float64).long()
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2 * count, dimension, generator=generator)
    outputs[:count, 0] += 1  # chosen ones
    table[places.numpy()] = outputs.numpy()
    del table
    for name, index in (("chosen_index", places[:count]), ("rejected_index", places[count:])):
        np.save(tmp_path / f"{name}.npy", index.numpy())
    described = {"version": 1, "arrays": ["outputs", "chosen_index", "rejected_index"], "event_shape": [dimension]}
    (tmp_path / "pairs.json").write_text(json.dumps({**described, "encoder": None}))
    pairs = pfm.EncodedPairs.load(tmp_path)
    assert pairs.table_bytes > memory
    assert torch.equal(pairs.gather(torch.arange(count)).chosen, outputs[:count].half().float())
    config = pfm.FlowConfig(residual=False, steps=1, device="cpu")
    flow = pfm.PreferenceFlow.fit(pairs, config, progress=False, preference=pfm.preferences.MeanShift())
    moved = flow.transport(outputs[count:]) - outputs[count:]
    assert float(moved.mean(0)[0]) == pytest.approx(0.5, abs=0.1)  # of the reference's draws half are chosen ones
