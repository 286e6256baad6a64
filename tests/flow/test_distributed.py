"""Fits by several processes: shares against the whole batch, real processes against one, one that dies, torchrun."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import two_processes
from support.places import ROOT
from torch import Tensor

import pfm
from pfm.flow.coupled import Coupled
from pfm.flow.distributed import Processes, Share
from pfm.flow.training import CHECKPOINT


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


# -- shares, without other processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    ("items", "strata", "repeats", "an_item"),
    [(64, 8, 2, 1), (40, 8, 4, 1), (7, 7, 2, 1), (24, 1, 1, 3), (12, 12, 1, 2)],
)
def test_the_shares_of_a_batch_are_its_rows_at_their_times(count, items, strata, repeats, an_item):
    rows = repeats * items * an_item
    numbers = torch.arange(rows, dtype=torch.float32)[:, None]
    batch = Coupled(numbers, -numbers, torch.arange(items * an_item)[:, None], numbers[:, 0], repeats)
    times = torch.arange(strata)
    times_of = times.repeat_interleave(items * an_item // strata).repeat(repeats)
    seen, of_all = [], 0.0
    for rank in range(count):
        share = Share(Processes(rank, count), items, strata)
        mine, noise = share.of(batch, numbers)
        own = times[share.times]
        t = own.repeat_interleave(len(mine.source) // (len(own) * repeats)).repeat(repeats)
        row = mine.source[:, 0].long()
        assert torch.equal(t, times_of[row])
        contexts, wanted = mine.row_context(), batch.row_context()
        assert contexts is not None
        assert wanted is not None
        assert torch.equal(contexts, wanted[row])
        assert torch.equal(mine.target, -mine.source)
        assert torch.equal(mine.weight, mine.source[:, 0])
        assert noise is not None
        assert torch.equal(noise, mine.source)
        assert share.of_all == pytest.approx(len(row) / rows)
        seen.append(row)
        of_all += share.of_all
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(rows))
    assert of_all == pytest.approx(1)


def test_one_process_keeps_the_batch_and_its_noise():
    batch = Coupled(torch.ones(4, 1), torch.ones(4, 1), None, torch.ones(4))
    noise = torch.ones(4, 1)
    assert Share(Processes(), 4, 1).of(batch, noise) == (batch, noise)


# -- two processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, dict, dict]:
    """The folder of two real processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    run = subprocess.run(
        [sys.executable, two_processes.__file__, str(folder), free_port()],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [0, 7], run.stderr[-3000:]
    assert "process 1" not in run.stderr
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return folder, first, second


def apart(found: list, wanted: Tensor) -> float:
    return float((torch.tensor(found) - wanted).abs().max())


@pytest.mark.parametrize("name", two_processes.FITS)
def test_two_processes_fit_the_field_of_one(name, two):
    _, first, second = two
    flow = two_processes.fit(*two_processes.FITS[name])
    assert (first["rank"], second["rank"], first["count"]) == (0, 1, 2)
    assert apart(first[name]["outputs"], two_processes.outputs(flow)) < 1e-4
    assert apart(second[name]["outputs"], torch.tensor(first[name]["outputs"])) < 1e-5
    ours, theirs = flow.metadata["training"], first[name]["metadata"]["training"]
    assert theirs["updates"] == ours["updates"] > 10
    for (update, loss), (wanted_update, wanted) in zip(theirs["validation"], ours["validation"], strict=True):
        assert (update, loss) == (wanted_update, pytest.approx(wanted, rel=1e-4))
    assert theirs["gain"] == pytest.approx(ours["gain"], abs=1e-3)


def test_a_residual_was_trained_and_kept_there(two):
    found = two[1]["a time a row"]["metadata"]
    assert found["residual_kept"]
    assert found["training"]["loss"] < 0.985 * found["training"]["plain_loss"]


def test_texts_are_shared_out_and_come_back_in_order(two):
    vectors = pfm.encoders.SurfaceEncoder().encode(two_processes.TEXTS)
    for found in two[1:]:
        assert apart(found["vectors"], vectors) == 0


def test_both_refuse_pairs_that_differ_and_batches_too_small_to_share(two):
    for found in two[1:]:
        assert "process 1 of 2 has other pairs and settings than process 0" in found["other pairs"]
        assert "a batch of 1 items" in found["small batch"]


def test_a_lost_process_ends_the_other_and_the_run_can_be_taken_up_by_one(two):
    folder, first, second = two
    assert re.search("process 0 of 2 stops, since another one has ended", first["lost"])
    assert "lost" not in second
    checkpoint = folder / "checkpoint"
    assert (checkpoint / CHECKPOINT).exists()
    begun = json.loads(_notes(checkpoint / CHECKPOINT)["log"])["updates"]
    assert begun > 0
    updates = []
    resumed = two_processes.fit(
        *two_processes.LAST, checkpoint=checkpoint, tracker=lambda values, step: updates.append(step)
    )
    assert updates[0] > begun
    whole = two_processes.fit(*two_processes.LAST)
    assert apart(two_processes.outputs(resumed).tolist(), two_processes.outputs(whole)) < 1e-4


def _notes(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


# -- alone, and mistakes --------------------------------------------------------------------------------------------


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pfm.processes() as group:
        assert (group.rank, group.count, group.first, group.several) == (0, 1, True, False)
        assert group.from_first(lambda: 5) == 5
        assert group.from_all(5) == [5]
        tensor = torch.ones(2)
        group.add([tensor])
        assert tensor.tolist() == [1, 1]


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ValueError, match=r"WORLD_SIZE=2 .* RANK.* is not set: start them with torchrun"),
        pfm.processes(),
    ):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="timeout_minutes must be above 0"), pfm.processes(timeout_minutes=0):
        pass


def fit_under_torchrun(folder: Path, rows: str) -> subprocess.CompletedProcess[str]:
    (folder / "pairs.jsonl").write_text(rows)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
        "-m", "pfm", "fit", "pairs.jsonl", "--out", "flow", "--encoder", "surface", "--set", "epochs=2",
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_fit_on_the_command_line_under_torchrun(tmp_path):
    rows = [{"prompt": f"Ask {n}", "chosen": f"Yes, {n} times!", "rejected": f"no {n}"} for n in range(40)]
    run = fit_under_torchrun(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("preference pairs") == run.stdout.count("saved to flow") == 1
    flow = pfm.PreferenceFlow.from_pretrained(tmp_path / "flow")
    assert flow.metadata["encoder"]["type"] == "SurfaceEncoder"
    assert sorted(path.name for path in (tmp_path / "flow").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_told_by_each_process(tmp_path):
    run = fit_under_torchrun(tmp_path, '{"prompt": 1}\n')
    assert run.returncode != 0
    assert "process 1: Error: " in run.stderr
    assert re.search(r"^Error: ", run.stderr, re.M)
