"""``pfm refine`` over a server: its options, interrupts at any point, and many prompts through many faults.

The studies at full size: ``PFM_STUDIES=1 pytest -s tests/cli/test_refine_api.py -m slow``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.alike import assert_alike
from support.command_line import FAST, command, interrupt, read_rows, run, write_pairs, write_rows
from support.draws import KEY
from support.fault_server import FAULTS, FaultServer, mixed_faults
from support.places import ROOT
from support.word_tokenizers import make_tokenizer

from pfm.flow import PreferenceFlow
from pfm.generators import OpenAIGenerator, ResponseCache
from pfm.refiner import Refinement, wrap

COUNT = 40
MEASURED = ("seconds",)
study = pytest.mark.skipif("PFM_STUDIES" not in os.environ, reason="takes minutes: set PFM_STUDIES=1")


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    run("fit", write_pairs(folder / "pairs.jsonl"), "--out", folder / "flow", *FAST, "--held-out", 0)
    return folder / "flow"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PFM_CACHE", str(tmp_path / "cache"))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def prompts_file(folder: Path, count: int = COUNT) -> Path:
    """Write prompts, two of them alike."""
    rows: list[Any] = [{"prompt": f"Question {number}?", "id": number} for number in range(count)]
    rows[count // 2]["prompt"] = rows[1]["prompt"]
    return write_rows(folder / "prompts.jsonl", rows)


def arguments(prompts: Path, flow: Path, out: Path, url: str, *more: object) -> list[object]:
    found = ["refine", prompts, "--flow", flow, "--out", out, "--model", "tiny", "--base-url", url]
    return [*found, "-n", 4, "-p", "seed=0", "--no-progress", *more]


# -------------------------------------------------------------------------------------------------------- options


def test_candidates_come_from_the_server_with_a_key_from_the_environment(flow, tmp_path):
    out = tmp_path / "refined.jsonl"
    with FaultServer(key=KEY) as server:
        given = arguments(
            prompts_file(tmp_path), flow, out, server.url, "--api-key-env", "MY_KEY", "-p", "temperature=0.7"
        )
        result = run(*given, MY_KEY=KEY)
        assert all(body["temperature"] == 0.7 and body["n"] == 4 for _, _, body in server.requests)
        assert len(server.requests) == COUNT
    rows = read_rows(out)
    assert [row["id"] for row in rows] == list(range(COUNT))
    for row in rows:
        refinement = Refinement.from_dict(row)
        assert (len(refinement.candidates), refinement.calls, refinement.error) == (4, 1, None)
        assert refinement.usage["total_tokens"] > 0
    assert rows[1]["prompt"] == rows[COUNT // 2]["prompt"]
    assert set(rows[1]["candidates"]).isdisjoint(rows[COUNT // 2]["candidates"])
    assert any(row["changed"] for row in rows)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(KEY.encode() not in path.read_bytes() for path in files)
    assert KEY not in result.output

    second = tmp_path / "again.jsonl"  # all of it is in the cache: the server is gone
    run(*given[:5], second, *given[6:], MY_KEY=KEY)
    assert_alike(read_rows(second, without=MEASURED), read_rows(out, without=MEASURED))
    shown = run("cache").stdout
    assert f"{4 * COUNT} responses" in shown
    assert "deleted 160 responses" in run("cache", "clear").stdout
    assert len(ResponseCache()) == 0
    assert "EndpointError" in read_rows(third_run(given, tmp_path / "third.jsonl"))[0]["error"]


def third_run(given: list[object], out: Path) -> Path:
    run(*given[:5], out, *given[6:], "--retries", 0, code=3, MY_KEY=KEY)
    return out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--generator", "json:loads"], "--generator and --model name different generators"),
        (["--api-key-env", "NO_SUCH_KEY"], "--api-key-env NO_SUCH_KEY: there is no such environment variable"),
        (["-p", "temperature"], "--parameter takes KEY=VALUE"),
        (["-p", "temprature=1"], "extra_body={'temprature'"),
        (["-p", "n=3"], "n cannot be set"),
        (["--cache", "x", "--no-cache"], "contradict each other"),
        (["--local-model", "./no/such"], "--model and --local-model name different generators"),
    ],
)
def test_a_mistake_is_one_line(more, told, flow, tmp_path):
    given = arguments(prompts_file(tmp_path, 4), flow, tmp_path / "x", "http://127.0.0.1:9/v1", *more)
    lines = run(*given, code=2).stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert told in lines[0]


def test_options_of_a_server_need_a_model(flow, tmp_path):
    start: list[object] = ["refine", prompts_file(tmp_path, 4), "--flow", flow, "--out", tmp_path / "x"]
    assert "belong to --model NAME" in run(*start, "--base-url", "http://127.0.0.1:9/v1", code=2).stderr
    assert "belongs to --model or --local-model" in run(*start, "-p", "seed=1", code=2).stderr
    assert "no key" in run(*start, "--model", "gpt", code=2).stderr
    assert "no/such" in run(*start, "--local-model", "./no/such", code=2).stderr


def test_a_local_model_is_a_generator_too(flow, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=15, n_positions=48, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "refined.jsonl"
    given = ["refine", prompts_file(tmp_path, 6), "--flow", flow, "--out", out, "--local-model", tmp_path / "model"]
    run(*given, "-n", 3, "-p", "max_new_tokens=5", "--no-progress")
    first = read_rows(out, without=MEASURED)
    assert all(len(row["candidates"]) == 3 for row in first)
    assert len(ResponseCache()) == 18
    out.unlink()
    run(*given, "-n", 3, "-p", "max_new_tokens=5", "--no-progress", "--no-cache")
    assert read_rows(out, without=MEASURED) == first  # the seed alone gives them again


def test_a_spent_budget_is_an_error_that_another_run_mends(flow, tmp_path):
    out = tmp_path / "refined.jsonl"
    with FaultServer() as server:
        given = arguments(prompts_file(tmp_path), flow, out, server.url, "--max-calls", 15)
        for left in (25, 10, 0):
            run(*given, code=3 if left else 0)
            rows = read_rows(out)
            assert [row["id"] for row in rows] == list(range(COUNT))
            assert sum("BudgetError" in (row["error"] or "") for row in rows) == left
        assert len(server.requests) == COUNT
        whole = tmp_path / "whole.jsonl"
        run(*arguments(prompts_file(tmp_path), flow, whole, server.url, "--no-cache"))
    assert_alike(read_rows(out, without=MEASURED), read_rows(whole, without=MEASURED))


# ----------------------------------------------------------------------------------------------- faults and kills


def test_runs_through_faults_end_in_the_file_of_a_run_without(flow, tmp_path):
    out, whole = tmp_path / "refined.jsonl", tmp_path / "whole.jsonl"
    prompts = prompts_file(tmp_path)
    with FaultServer(mixed_faults(0.3, ("500", "reset", "invalid_json", "cut", "empty_choices")), seed=5) as server:
        codes = []
        while not codes or codes[-1] != 0:
            codes.append(run(*arguments(prompts, flow, out, server.url, "--retries", 1), code=None).exit_code)
            rows = read_rows(out)
            assert [row["id"] for row in rows] == list(range(COUNT))
            assert {len(row["candidates"]) for row in rows if row["error"] is None} == {4}
        assert 3 in codes
        assert set(codes) == {0, 3}
        server.faults = {}
        run(*arguments(prompts, flow, whole, server.url, "--no-cache"))
    assert_alike(read_rows(out, without=MEASURED), read_rows(whole, without=MEASURED))


def test_ctrl_c_ends_at_once_though_the_server_hangs_and_repeats_no_finished_call(flow, tmp_path):
    out, prompts = tmp_path / "refined.jsonl", prompts_file(tmp_path)
    with FaultServer(delay=0.1, hang=600) as server:
        given = arguments(prompts, flow, out, server.url, "--concurrency", 2)

        def ready() -> bool:
            if not out.exists() or not out.stat().st_size:
                return False
            server.faults = {"hang": 1.0}
            if server.outcomes["hang"] < 2:
                return False
            time.sleep(0.5)  # it waits for answers that do not come, and has time to take in those that came before
            return True

        stopped = interrupt(given, tmp_path, ready)
        assert server.under_way == 2  # they still do not
        assert stopped.returncode == 130
        assert "Traceback" not in stopped.stderr
        kept = len(read_rows(out))
        assert 0 < kept < COUNT
        assert f"{kept} of {COUNT} rows are in" in stopped.stderr
        server.delay, server.faults = 0, {}
        run(*given)
        assert COUNT <= len(server.requests) <= COUNT + 2  # those that hung
        whole = tmp_path / "whole.jsonl"
        run(*arguments(prompts, flow, whole, server.url, "--no-cache"))
    assert_alike(read_rows(out, without=MEASURED), read_rows(whole, without=MEASURED))


def kill_and_run_again(kills: int, count: int, flow: Path, folder: Path, n: str) -> None:
    """Kill runs at random moments, and compare what the last one leaves with an undisturbed run."""
    out, whole, prompts = folder / "refined.jsonl", folder / "whole.jsonl", prompts_file(folder, count)
    source = random.Random(1)
    concurrency = 4
    with FaultServer(delay=0.05, n=n) as server:
        given = arguments(prompts, flow, out, server.url, "--concurrency", concurrency)
        killed = 0
        while killed < kills:
            before = len(server.requests)
            process = subprocess.Popen(command(*given), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            deadline = time.monotonic() + 60
            while len(server.requests) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(source.uniform(0, 1.3 * count * 0.05 / concurrency / kills * (1 if n == "obey" else 4)))
            if process.poll() is None:
                killed += 1
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode == 0:
                break
        server.delay = 0
        run(*given)
        calls = count * (1 if n == "obey" else 4)
        assert killed == kills
        # Only what was under way when a run was killed is asked for again.
        assert calls <= len(server.requests) <= calls + concurrency * kills
        run(*arguments(prompts, flow, whole, server.url, "--no-cache"))
    assert [row["id"] for row in read_rows(out)] == list(range(count))
    assert_alike(read_rows(out, without=MEASURED), read_rows(whole, without=MEASURED))


@pytest.mark.parametrize("n", ["ignore"])
def test_a_killed_run_is_completed_to_the_same_file(n, flow, tmp_path):
    kill_and_run_again(2, 60, flow, tmp_path, n)


# ------------------------------------------------------------------------------------------------ many through faults


@contextlib.contextmanager
def server_process(*options: object) -> Iterator[str]:
    """Run the fault server in a process of its own, so that it shares no interpreter with what is timed."""
    script = ROOT / "tests" / "support" / "fault_server.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "--port", "0", *map(str, options)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait()


def seen_by(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/seen") as answer:
        return json.load(answer)


def least_seconds(chains: list[list[str]], concurrency: int, delay: float, timeout: float) -> float:
    """Give the time that the waits alone take: each chain in turn to the first of the hands that is free.

    A try takes the server's delay, or the timeout where it does not answer; before another the client waits half
    a second, then a second, as it does by itself, or as long as Retry-After says (one second).
    """
    hands = [0.0] * concurrency
    for chain in chains:
        waits = 0.0
        for number, fault in enumerate(chain):
            waits += timeout if fault in ("hang", "trickle") else delay
            if number + 1 < len(chain):
                waits += 1.0 if fault == "429" else 0.5 * 2**number
        hands[hands.index(min(hands))] += waits
    return max(hands)


def refine_through(
    faults: dict[str, float], flow: Path, count: int, concurrency: int, delay: float, timeout: float
) -> tuple[float, float, list[Refinement], dict[str, Any]]:
    """Refine through a server; return the seconds taken, those the waits alone take, results, what the server saw."""
    from pfm.encoders import SurfaceEncoder

    given = [f"--fault={name}={share}" for name, share in faults.items()]
    with server_process("--delay", delay, "--seed", 1, *given) as url:
        generator = OpenAIGenerator("tiny", base_url=url, concurrency=concurrency, timeout=timeout, seed=0)
        refiner = wrap(generator, PreferenceFlow.from_pretrained(flow), encoder=SurfaceEncoder(), n=4)
        refiner.refine([["One.", "Two."]], ["Warm up?"])
        prompts: list[Any] = [f"Question {number}?" for number in range(count)]
        saved: list[Refinement] = []
        started = time.monotonic()
        results = refiner.batch(prompts, progress=False, on_result=saved.append)
        seconds = time.monotonic() - started
        seen = seen_by(url)
    assert saved == results
    assert [result.prompt for result in results] == prompts
    return seconds, least_seconds(seen["chains"], concurrency, delay, timeout), results, seen


def check_through_faults(flow: Path, count: int, concurrency: int, delay: float, timeout: float) -> dict[str, Any]:
    """Refine with and without faults; check that nothing is lost, and return what it took."""
    free, free_least, plain, _ = refine_through({}, flow, count, concurrency, delay, timeout)
    faulty, faulty_least, results, seen = refine_through(mixed_faults(0.2), flow, count, concurrency, delay, timeout)
    met = Counter(fault for chain in seen["chains"] for fault in chain)
    assert set(met) - {"ok"} <= FAULTS.keys()
    share = 1 - met["ok"] / met.total()
    assert abs(share - 0.2) < 4 * (0.16 / met.total()) ** 0.5
    for before, after in zip(plain, results, strict=True):
        assert before.error is None
        if after.error is None:
            assert (after.text, after.candidates, after.changed) == (before.text, before.candidates, before.changed)
        else:
            assert after.error.startswith(("BadAnswerError: ", "RateLimitError: ", "ServerError: "))
    outcomes = Counter("error" if result.error else "refined" if result.changed else "kept" for result in results)
    assert outcomes["refined"] + outcomes["kept"] + outcomes["error"] == count
    assert 0 < outcomes["error"] < 0.2 * count
    return {
        "prompts": count,
        "outcomes": dict(outcomes),
        "faults": dict(met),
        "most at once": seen["most_at_once"],
        "seconds without faults": round(free, 2),
        "seconds with faults": round(faulty, 2),
        "waits imposed": round(faulty_least - free_least, 2),
        "allowed": round(1.3 * free + faulty_least - free_least, 2),
    }


def test_every_prompt_ends_in_a_result_or_an_error_through_mixed_faults(flow):
    check_through_faults(flow, 80, 32, 0.02, 0.5)


@study
@pytest.mark.slow
def test_500_prompts_at_concurrency_32_through_a_fifth_of_faults(flow):
    found = check_through_faults(flow, 500, 32, 0.5, 2.0)
    print(json.dumps(found, indent=2))
    assert found["seconds with faults"] < found["allowed"]


@study
@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_same_file(flow, tmp_path):
    kill_and_run_again(10, 500, flow, tmp_path, "obey")
