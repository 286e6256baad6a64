"""The response cache: what is found again, several processes at once, and what a crash leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from support.draws import KEY, drawn, named_reply
from support.fault_server import FaultServer

from pfm.generators import CachedGenerator, OpenAIGenerator, ResponseCache
from pfm.generators.base import Sample
from pfm.generators.cache import sample_key

PROMPTS = [f"Question {number}?" for number in range(6)]


def samples(numbers: range) -> dict[bytes, Sample]:
    return {sample_key({"m": 1}, "p", number): Sample(f"text {number}", origin=f"{number}") for number in numbers}


# ------------------------------------------------------------------------------------------------------- the store


def test_what_is_stored_is_found_again_and_the_first_stays(tmp_path):
    cache = ResponseCache(tmp_path / "new" / "folder")
    assert (len(cache), cache.size_bytes, cache.get(list(samples(range(2))))) == (0, 0, {})
    assert not cache.folder.exists()  # looking makes nothing
    stored = samples(range(1200))
    cache.put(stored)
    first = next(iter(stored))
    cache.put({first: Sample("another")})
    again = ResponseCache(tmp_path / "new" / "folder")
    assert again.get([*stored, b"unknown"]) == stored
    assert len(again) == 1200
    assert again.size_bytes > 0
    again.clear()
    assert (len(again), len(cache), cache.get([first])) == (0, 0, {})
    cache.put({first: Sample("new", "length", "tag", "o", 2, {"total_tokens": 3})})
    assert again.get([first]) == {first: Sample("new", "length", "tag", "o", 2, {"total_tokens": 3})}


def test_the_key_holds_all_that_the_response_depends_on():
    base: dict[str, Any] = {"name": "m", "base_url": "u", "parameters": {"temperature": 1, "seed": None}}
    asked: list[tuple[dict[str, Any], Any, int]] = [
        (base, "p", 0),
        (base, "p", 1),
        (base, "q", 0),
        (base, [{"role": "system", "content": "p"}], 0),
        (base | {"name": "n"}, "p", 0),
        (base | {"base_url": "v"}, "p", 0),
        (base | {"parameters": {"temperature": 1}}, "p", 0),
        (base | {"parameters": {"temperature": 1.5, "seed": None}}, "p", 0),
        (base | {"parameters": {"temperature": 1, "seed": None, "extra_body": {"k": [1]}}}, "p", 0),
    ]
    keys = [sample_key(*arguments) for arguments in asked]
    assert len(set(keys)) == len(keys)
    assert sample_key({"parameters": {"seed": None, "temperature": 1}, "base_url": "u", "name": "m"}, "p", 0) == keys[0]
    assert sample_key(base, [{"role": "user", "content": "p"}], 0) == keys[0]


@pytest.mark.parametrize("harm", ["noise", "empty", "cut", "other table"])
def test_a_damaged_file_costs_a_warning_and_no_run(harm, tmp_path, caplog):
    path = tmp_path / "responses.sqlite"
    cache = ResponseCache(tmp_path)
    cache.put(samples(range(500)))
    cache.close()
    if harm == "noise":
        path.write_bytes(os.urandom(5000))
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "cut":
        os.truncate(path, path.stat().st_size // 3)
    else:
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE responses (something TEXT)")
    for name in ("-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    with FaultServer() as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, cache=tmp_path)
        for _ in range(2):
            assert [draw.error for draw in drawn(generator, PROMPTS, 2)] == [None] * 6
        assert len(server.requests) == (6 if harm == "empty" else 12)
    assert ("continues without it" in caplog.text) == (harm != "empty")
    assert len(caplog.records) <= 1
    ResponseCache(tmp_path).clear()
    if harm != "other table":
        renewed = ResponseCache(tmp_path)
        renewed.put(samples(range(3)))
        assert len(renewed) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_still_read(tmp_path, caplog):
    cache = ResponseCache(tmp_path)
    cache.put(samples(range(3)))
    cache.close()
    tmp_path.chmod(0o500)
    try:
        reader = ResponseCache(tmp_path)
        for _ in range(2):
            assert reader.get(list(samples(range(3)))) == samples(range(3))
            reader.put(samples(range(3, 5)))
        assert len(caplog.records) == 1
        assert "cannot be written" in caplog.text
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with FaultServer() as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, cache=tmp_path / "file" / "folder")
        assert [draw.error for draw in drawn(generator, PROMPTS, 2)] == [None] * 6
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text


WRITER = """
import sys
from pfm.generators import ResponseCache
from pfm.generators.base import Sample
from pfm.generators.cache import sample_key
cache = ResponseCache(sys.argv[1])
for number in range(10**6 if sys.argv[2] == "for ever" else 300):
    key = sample_key({"m": 1}, "p", number)
    cache.put({key: Sample(f"text {number}", origin=f"{number}")})
    assert cache.get([key])[key].text == f"text {number}"
    if number == 0:
        print("began", flush=True)
"""


def writer(folder: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), how], stdout=subprocess.PIPE, text=True)


def test_several_processes_write_and_read_one_cache(tmp_path):
    processes = [writer(tmp_path, "once") for _ in range(4)]
    cache, seen = ResponseCache(tmp_path), 0
    while any(process.poll() is None for process in processes):
        found = cache.get(list(samples(range(300))))
        assert all(sample.text == f"text {sample.origin}" for sample in found.values())
        assert len(found) >= seen
        seen = len(found)
        time.sleep(0.01)
    assert [process.wait() for process in processes] == [0] * 4
    assert cache.get(list(samples(range(300)))) == samples(range(300))


def test_a_killed_process_leaves_whole_responses(tmp_path):
    counts = []
    for _ in range(3):
        process = writer(tmp_path, "for ever")
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        cache = ResponseCache(tmp_path)
        counts.append(len(cache))
        assert cache.get(list(samples(range(counts[-1])))) == samples(range(counts[-1]))
    assert counts == sorted(counts)
    assert counts[-1] > 0


def test_threads_share_one_cache(tmp_path):
    cache = ResponseCache(tmp_path)

    def work(part: int) -> None:
        for number in range(part * 50, part * 50 + 50):
            cache.put(samples(range(number, number + 1)))

    threads = [threading.Thread(target=work, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get(list(samples(range(400)))) == samples(range(400))


# ----------------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("n", ["obey", "ignore"])
def test_the_same_draw_is_asked_for_once(n, how, tmp_path):
    with FaultServer(n=n, reply=named_reply) as server:
        first = OpenAIGenerator("tiny", base_url=server.url, cache=tmp_path)
        before = drawn(first, PROMPTS, 4, how)
        requests = len(server.requests)
        second = OpenAIGenerator("tiny", base_url=server.url, cache=tmp_path)
        after = drawn(second, PROMPTS, 4, how)
        assert len(server.requests) == requests
        assert (second.calls, second.usage) == (0, {})
        for old, new in zip(before, after, strict=True):
            # What the texts took is told again; what this run took are the generator's own totals.
            assert (new.texts, new.finish_reasons, new.usage) == (old.texts, old.finish_reasons, old.usage)
            assert new.calls == old.calls
        assert [draw.texts for draw in drawn(second, PROMPTS, 2, how)] == [draw.texts[:2] for draw in before]
        assert len(server.requests) == requests
        more = drawn(second, PROMPTS, 6, how)  # the rest alone is asked for
        assert [draw.texts[:4] for draw in more] == [draw.texts for draw in before]
        assert [len(draw.texts) for draw in more] == [6] * 6
        assert second.calls == len(server.requests) - requests == (6 if n == "obey" else second.calls)
        # A prompt that comes twice draws twice, and does so again.
        twice = [draw.texts for draw in drawn(second, ["Hi", "Hi"], 2, how)]
        assert set(twice[0]).isdisjoint(twice[1])
        assert [draw.texts for draw in drawn(first, ["Hi", "Hi"], 2, how)] == twice


@pytest.mark.parametrize("how", ["sync", "async"])
def test_answers_that_come_together_are_counted_one_at_a_time(how, tmp_path, monkeypatch):
    # Counting takes long here, so that two answers counted at once would each miss the other.
    named = uuid.uuid4
    monkeypatch.setattr("pfm.generators.sampling.uuid.uuid4", lambda: (time.sleep(0.01), named())[1])
    with FaultServer(n="ignore", reply=named_reply) as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, cache=tmp_path)
        draws = drawn(generator, PROMPTS, 4, how)
        assert [sorted(draw.texts) for draw in draws] == [[f"{p} {number}" for number in range(4)] for p in PROMPTS]
        assert len(server.requests) == generator.calls == 4 * len(PROMPTS)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"temperature": 0.5},
        {"seed": 3},
        {"extra_body": {"top_k": 3}},
        {"api": "responses"},
        {"base_url": "/v1/"},
    ],
)
def test_another_setting_is_another_draw(change: dict[str, Any], tmp_path):
    with FaultServer(models=["tiny", "other"]) as server:
        options: dict[str, Any] = {"model": "tiny", "base_url": server.url, "cache": tmp_path}
        drawn(OpenAIGenerator(**options), ["Hi"], 1)
        same = "base_url" in change
        change = {"base_url": f"{server.url}/"} if same else change
        drawn(OpenAIGenerator(**(options | change)), ["Hi"], 1)
        assert len(server.requests) == (1 if same else 2)
        neutral: dict[str, Any] = {
            "concurrency": 1,
            "timeout": 9,
            "max_retries": 0,
            "max_calls": 5,
            "n_per_call": 1,
            "api_key": "k",
        }
        drawn(OpenAIGenerator(**(options | neutral)), ["Hi"], 1)
        assert len(server.requests) == (1 if same else 2)


def test_failures_and_unusable_outputs_are_not_stored(tmp_path):
    with FaultServer({"500": 0.3, "blank": 0.3}, n="ignore", seed=2) as server:
        options: dict[str, Any] = {"base_url": server.url, "cache": tmp_path, "max_retries": 0, "n_per_call": 1}
        before = drawn(OpenAIGenerator("tiny", **options), PROMPTS, 4)
        kept = sum(len(draw.texts) for draw in before)
        assert 0 < kept < 24
        assert len(ResponseCache(tmp_path)) == kept
        server.faults = {}
        again = OpenAIGenerator("tiny", **options)
        after = drawn(again, PROMPTS, 4)
    assert again.calls == 24 - kept  # what is lacking, call by call
    assert all(draw.error is None and len(draw.texts) == 4 for draw in after)
    for old, new in zip(before, after, strict=True):
        assert set(old.texts) <= set(new.texts)


def test_a_cached_run_needs_no_server(tmp_path):
    with FaultServer() as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, cache=tmp_path, api_key=KEY)
        before = drawn(generator, PROMPTS, 3)
    again = OpenAIGenerator("tiny", base_url=server.url, cache=tmp_path, max_retries=0)
    assert [draw.texts for draw in drawn(again, PROMPTS, 3)] == [draw.texts for draw in before]
    assert str(drawn(again, ["New?"], 1)[0].error).startswith("EndpointError")
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert KEY.encode() not in stored
    assert b"Question" not in stored  # prompts are not kept


def test_cached_generator_stores_call_by_call_where_the_generator_can(tmp_path):
    with FaultServer(n="ignore") as server:
        plain = OpenAIGenerator("tiny", base_url=server.url, max_calls=10)
        cached = CachedGenerator(plain, tmp_path)
        assert cached.describe() == plain.describe()
        before = drawn(cached, PROMPTS, 4)
        assert plain.calls == 10  # the budget is the generator's own
        assert len(ResponseCache(tmp_path)) == 10
        assert [draw.texts for draw in drawn(cached, PROMPTS, 4, "async")] == [draw.texts for draw in before]


def test_a_function_is_cached_under_a_name(tmp_path):
    calls: list[str] = []

    def reply(prompt: str) -> str:
        calls.append(prompt)
        if "3" in prompt and len(calls) < 20:
            raise ConnectionError("no answer")
        return f"{prompt} {len(calls)}"

    with pytest.raises(ValueError, match="pass name="):
        CachedGenerator(reply, tmp_path)
    cached = CachedGenerator(reply, tmp_path, name="reply 1")
    before = drawn(cached, PROMPTS, 3)
    assert [draw.error is None for draw in before] == [True, True, True, False, True, True]
    made = len(calls)
    after = drawn(CachedGenerator(reply, tmp_path, name="reply 1"), PROMPTS, 3)
    assert calls[made:] == ["Question 3?"]
    assert [draw.texts for draw in after] == [draw.texts for draw in before]
    assert [draw.calls for draw in after] == [3, 3, 3, 1, 3, 3]
    calls += ["padding"] * 20
    whole = drawn(cached, PROMPTS, 3)
    assert [len(draw.texts) for draw in whole] == [3] * 6
    more = drawn(cached, PROMPTS[:1], 5)[0]
    assert more.texts[:3] == before[0].texts
    assert len(set(more.texts)) == 5
    other = drawn(CachedGenerator(reply, tmp_path, name="reply 2"), PROMPTS, 3)
    assert not {text for draw in other for text in draw.texts} & {text for draw in whole for text in draw.texts}


def test_an_async_function_is_cached_too(tmp_path):
    calls: list[str] = []

    async def reply(prompt: str) -> str:
        calls.append(prompt)
        await asyncio.sleep(0)
        return prompt

    for _ in range(2):
        assert [draw.texts for draw in drawn(CachedGenerator(reply, tmp_path, name="a"), PROMPTS, 2)] == [
            [prompt] * 2 for prompt in PROMPTS
        ]
    assert len(calls) == 12


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("PFM_CACHE", str(tmp_path / "one"))
    assert ResponseCache().folder == tmp_path / "one"
    monkeypatch.delenv("PFM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    assert ResponseCache().folder == tmp_path / "two" / "pfm" / "responses"
    assert json.loads(json.dumps(str(ResponseCache(tmp_path)))).startswith("ResponseCache(")


# ------------------------------------------------------------------------------------------- damage, size, old files


def harmed(path: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("value = ?", b'{"text": "forged"}'),
        ("value = CAST(? AS TEXT)", b'{"text": "\xff\xfe"}'),
        ("value = ?", b"not JSON"),
        ("value = ?", 7),
        ("value = ?", b"[" * 100_000),
        ("checksum = ?", None),
        ("checksum = ?", b"\0" * 32),
        ("value = (SELECT value FROM responses WHERE key <> ? LIMIT 1)", b""),
        ("(value, checksum) = (SELECT value, checksum FROM responses WHERE key <> ? LIMIT 1)", b""),
    ],
)
def test_a_changed_row_is_never_served_and_costs_that_row_alone(change, value, tmp_path, caplog):
    cache = ResponseCache(tmp_path)
    stored = samples(range(50))
    cache.put(stored)
    cache.close()
    bad = sorted(stored)[7]
    harmed(tmp_path / "responses.sqlite", f"UPDATE responses SET {change} WHERE key = ?", value, bad)
    found = cache.get(list(stored))
    assert found == {key: sample for key, sample in stored.items() if key != bad}
    assert [record.getMessage() for record in caplog.records if "holds damaged rows" in record.getMessage()]
    cache.put({bad: stored[bad]})  # asked again, and kept
    assert ResponseCache(tmp_path).get(list(stored)) == stored
    assert len(caplog.records) == 1


def test_a_damaged_part_of_the_file_costs_what_it_held(tmp_path, caplog):
    cache = ResponseCache(tmp_path)
    stored = {key: Sample("text " * 200, origin=f"{place}") for place, key in enumerate(samples(range(400)))}
    cache.put(stored)
    cache.close()
    path = tmp_path / "responses.sqlite"
    data = bytearray(path.read_bytes())
    data[40 * 4096 : 41 * 4096] = os.urandom(4096)
    path.write_bytes(data)
    found = ResponseCache(tmp_path).get(list(stored))
    assert 300 < len(found) < 400
    assert all(stored[key] == sample for key, sample in found.items())
    assert len(caplog.records) == 1


def test_a_cache_of_before_checksums_is_taken_over(tmp_path):
    stored = samples(range(20))
    with sqlite3.connect(tmp_path / "responses.sqlite") as connection:
        connection.execute("CREATE TABLE responses (key BLOB PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        rows = [(key, json.dumps(vars(sample))) for key, sample in stored.items()]
        connection.executemany("INSERT INTO responses VALUES (?, ?)", rows)
    connection.close()
    cache = ResponseCache(tmp_path)
    assert cache.get(list(stored)) == stored
    cache.put(samples(range(20, 30)))
    assert len(ResponseCache(tmp_path)) == 30


def test_the_oldest_responses_make_room(tmp_path):
    cache = ResponseCache(tmp_path, max_bytes=200_000)
    keys = list(samples(range(600)))
    for key in keys:
        cache.put({key: Sample("x" * 1000)})
    assert 0 < len(cache) < 300
    assert cache.size_bytes < 6_000_000  # with the log of the last writes, which does not grow
    found = cache.get(keys)
    assert keys[-1] in found
    assert keys[0] not in found
    with pytest.raises(ValueError, match="max_bytes must be"):
        ResponseCache(tmp_path, max_bytes=0)
