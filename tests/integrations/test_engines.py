"""The refiner in the workers of datasets, Ray Data and Spark: no row is lost or doubled, though a worker is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.map_outputs import Refine
from support.places import ROOT

import pfm
from pfm.encoders import SurfaceEncoder

ROWS = 80
CANDIDATES = ["no thanks", "Yes, please!"]


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    pairs = pfm.PreferencePairs.from_rows(
        {"prompt": f"Ask {n}", "chosen": f"Yes, {n} times!", "rejected": f"no {n}"} for n in range(60)
    )
    encoded = pairs.encode(SurfaceEncoder(), progress=False)
    fitted = pfm.PreferenceFlow.fit(
        encoded, pfm.FlowConfig(residual=False), progress=False, preference=pfm.preferences.MeanShift()
    )
    fitted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    pq = pytest.importorskip("pyarrow.parquet", reason="needs pip install 'preference-flow[parquet]'")
    from pyarrow import table

    folder = tmp_path_factory.mktemp("answers")
    for part in range(4):
        numbers = range(part * ROWS // 4, (part + 1) * ROWS // 4)
        columns = {
            "id": list(numbers),
            "prompt": [f"Größe {n}?" for n in numbers],
            "candidates": [CANDIDATES if n % 3 else CANDIDATES[:1] for n in numbers],
        }
        pq.write_table(table(columns), folder / f"part-{part}.parquet")
    return folder


def check(folder: Path) -> None:
    """Check that every row was refined once, as in this process."""
    import pyarrow.dataset

    rows = pyarrow.dataset.dataset(sorted(folder.glob("*.parquet"))).to_table().to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(ROWS))
    assert all(row["refined"] == CANDIDATES[min(row["id"] % 3, 1)] for row in rows)
    assert all(row["prompt"] == f"Größe {row['id']}?" and not row["error"] for row in rows)


def test_datasets_in_two_processes_after_work_on_two_threads(flow, answers, tmp_path):
    # A forked worker hangs in the first product on several threads if its parent has had one.
    pytest.importorskip("datasets")
    program = f"""
import sys, torch, datasets
sys.path.insert(0, {str(ROOT / "tests")!r})
from support.map_outputs import Refine
torch.set_num_threads(2)
refine = Refine({str(flow)!r})
torch.ones(900, 900) @ torch.ones(900, 900)
refine.refiner.flow.win_probability(torch.ones(20_000, refine.refiner.flow.dimension), torch.ones(20_000, 28))
rows = datasets.Dataset.from_parquet({sorted(map(str, answers.iterdir()))})
refined = rows.map(refine.refiner.map_batch, batched=True, batch_size=10, num_proc=2)
refined.to_parquet({str(tmp_path / "all.parquet")!r})
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "2", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    check(tmp_path)


@pytest.mark.slow
def test_ray_data_restarts_a_killed_worker_and_loses_no_row(flow, answers, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs pip install 'ray[data]' aiohttp")
    pytest.importorskip("aiohttp", reason="needs pip install 'ray[data]' aiohttp")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default its workers stand back behind all else
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    try:
        rows = ray.data.read_parquet(str(answers)).repartition(8)  # small files come as one block, for one worker
        killed = tmp_path / "killed"
        refined = rows.map_batches(
            Refine, fn_constructor_args=(str(flow), str(killed)), batch_size=10,
            compute=ray.data.ActorPoolStrategy(size=2),
        )  # fmt: skip
        refined.write_parquet(str(tmp_path / "refined"))
    finally:
        ray.shutdown()
    assert killed.exists()
    check(tmp_path / "refined")


@pytest.mark.slow
def test_spark_maps_data_frames(flow, answers, tmp_path, monkeypatch):
    pytest.importorskip("pyspark", reason="needs pip install pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs java")
    from pyspark.sql import SparkSession  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )
    try:
        schema = (
            "id long, prompt string, candidates array<string>, refined string, original string, "
            "win_probability double, changed boolean, error string"
        )
        rows = spark.read.parquet(str(answers))
        rows.mapInPandas(Refine(str(flow)).frames, schema).write.parquet(str(tmp_path / "refined"))
    finally:
        spark.stop()
    check(tmp_path / "refined")
