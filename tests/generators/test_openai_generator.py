"""OpenAIGenerator through the real client, against a server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import threading
import time
import traceback
from typing import Any

import openai
import pytest
from support.draws import KEY, drawn, named_reply
from support.fault_server import FAULTS, FaultServer, default_reply
from support.letters import LetterEncoder, LinearFlow

from pfm import errors
from pfm.generators import AsyncCallableGenerator, OpenAIGenerator, as_generator
from pfm.refiner import wrap

PROMPTS = [f"Question {number}?" for number in range(8)]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


# ----------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(
    ("n", "api", "calls"),
    [("obey", "chat", 1), ("ignore", "chat", 4), ("refuse", "chat", 5), ("obey", "responses", 4)],
)
def test_n_texts_come_in_order_whatever_the_server_makes_of_n(n, api, calls, how):
    with FaultServer(n=n, reply=named_reply) as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, api=api, concurrency=4)
        (first,) = drawn(generator, PROMPTS[:1], 4, how)
        assert (first.calls, generator.calls, len(server.requests)) == (calls, calls, calls)
        draws = drawn(generator, PROMPTS, 4, how)
        assert server.most_at_once <= 4
        assert generator.calls == len(server.requests)
    # What a server makes of n is learned once.
    assert [draw.calls for draw in draws] == [min(calls, 4)] * 8
    for prompt, draw in zip(PROMPTS, draws, strict=True):
        assert draw.error is None
        assert [text.rpartition(" ")[0] for text in draw.texts] == [prompt] * 4
        assert len(set(draw.texts)) == 4
        assert draw.finish_reasons == ["stop"] * 4
    totals = generator.usage
    assert totals["total_tokens"] == totals["prompt_tokens"] + totals["completion_tokens"]
    assert totals["total_tokens"] == sum(draw.usage["total_tokens"] for draw in [first, *draws])


def test_only_what_the_user_has_set_is_sent():
    with FaultServer() as server:
        drawn(OpenAIGenerator("tiny", base_url=server.url), ["Hi"], 1)
        drawn(OpenAIGenerator("tiny", base_url=server.url), ["Hi"], 3)
        options = {"temperature": 0.5, "max_completion_tokens": 9, "extra_body": {"top_k": 4}}
        drawn(OpenAIGenerator("tiny", base_url=server.url, n_per_call=2, **options), ["Hi"], 3)
        conversation = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        drawn(OpenAIGenerator("tiny", base_url=server.url, api="responses"), [conversation], 1)
        bodies = [body for _, _, body in server.requests]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    assert bodies[0] == asked
    assert bodies[1] == asked | {"n": 3}
    set_by_user = {"temperature": 0.5, "max_completion_tokens": 9, "top_k": 4}
    assert sorted(bodies[2:4], key=len) == [asked | set_by_user, asked | set_by_user | {"n": 2}]
    assert bodies[4] == {"model": "tiny", "input": conversation}


@pytest.mark.parametrize("n", ["obey", "ignore"])
def test_a_seed_gives_each_sample_its_own_and_the_same_again(n):
    with FaultServer(n=n, reply=named_reply) as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, seed=100)
        (draw,) = drawn(generator, ["Hi"], 4)
        assert draw.texts == [f"Hi {number}" for number in (100, 101, 102, 103)]
        assert drawn(OpenAIGenerator("tiny", base_url=server.url, seed=100), ["Hi"], 4)[0].texts == draw.texts
        assert drawn(generator, ["Hi"], 2, start=[4])[0].texts == ["Hi 104", "Hi 105"]
        # A prompt that comes twice goes on where it left off.
        again = drawn(generator, ["Hi", "Ho", "Hi"], 2)
        assert [draw.texts[0] for draw in again] == ["Hi 100", "Ho 100", "Hi 102"]


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_text_that_is_cut_is_kept_and_said_to_be(how, monkeypatch):
    from support.fault_server import _Handler

    deliver = _Handler._deliver

    def cut(self, value, fault):
        value["choices"][0]["finish_reason"] = "length"
        deliver(self, value, fault)

    monkeypatch.setattr(_Handler, "_deliver", cut)
    with FaultServer() as server:
        (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url), ["Hi"], 2, how)
    assert draw.finish_reasons == ["length", "stop"]


def test_requests_of_several_prompts_run_at_once_up_to_the_bound():
    together = threading.Barrier(8)

    def reply(messages: list[dict[str, Any]], number: int) -> str:
        together.wait(60)  # for seven others that are under way
        return default_reply(messages, number)

    with FaultServer(reply=reply) as server:
        draws = drawn(OpenAIGenerator("tiny", base_url=server.url, concurrency=8), PROMPTS * 2, 1)
        assert server.most_at_once == 8
    assert all(draw.error is None for draw in draws)


def test_one_bound_holds_for_all_draws_of_a_generator():
    async def work(generator) -> None:
        async def one(prompt: str) -> None:
            assert len((await anext(generator.adraws([prompt], 2))).texts) == 2

        await asyncio.gather(*(one(prompt) for prompt in PROMPTS * 2))

    with FaultServer(delay=0.02, n="ignore") as server:
        asyncio.run(work(OpenAIGenerator("tiny", base_url=server.url, concurrency=3)))
        assert server.most_at_once == 3
    with FaultServer(delay=0.02, n="ignore") as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, concurrency=3)
        threads = [threading.Thread(target=drawn, args=(generator, PROMPTS, 2)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.most_at_once == 3
        assert len(server.requests) == generator.calls >= 64


def test_generate_gives_rows_of_texts_and_raises_with_what_is_there():
    with FaultServer() as server:
        generator = OpenAIGenerator("tiny", base_url=server.url)
        assert [len(row) for row in generator.generate(PROMPTS[:2], 3)] == [3, 3]
        with pytest.raises(errors.GenerationError, match=r"prompts\[1\]: RequestRefusedError") as caught:
            generator.generate(["Hi", []], 2)
        assert [len(row) for row in caught.value.partial] == [2, 0]


# ------------------------------------------------------------------------------------------------- what goes wrong


NAMES = {
    "429": ("RateLimitError", "slow down"),
    "500": ("ServerError", "out of order"),
    "hang": ("ServerError", "in time"),
    "reset": ("ServerError", "broke"),
    "cut": ("ServerError", "broke"),
    "invalid_json": ("BadAnswerError", "not JSON"),
    "empty_choices": ("BadAnswerError", "holds no"),
    "content_type": ("BadAnswerError", "a web page"),
    "trickle": ("ServerError", "took longer than 0.4 seconds"),
    "huge": ("ServerError", "larger than"),
    "non_string": ("NotTextError", "no text but list"),
    "tool_calls": ("ToolCallError", "called a tool"),
    "blank": ("EmptyAnswerError", "only white space"),
    "content_filter": ("ContentFilterError", "filtered"),
    "refused_content": ("ContentFilterError", "content management policy"),
}


UNUSABLE = ("non_string", "tool_calls", "blank", "content_filter")
WAYS = [(fault, "chat", how) for fault in FAULTS for how in ("sync", "async")]
WAYS += [(fault, "responses", "sync") for fault in (*UNUSABLE, "empty_choices")]


@pytest.mark.parametrize(("fault", "api", "how"), WAYS)
def test_a_fault_is_named_and_leaves_the_other_prompts_alone(fault, api, how, monkeypatch):
    name, told = NAMES[fault]
    monkeypatch.setattr("pfm._internal.endpoint.MAX_ANSWER_BYTES", 2_000_000)
    # An unusable text is asked for once more, so fewer prompts fail of those.
    share = 0.75 if fault in UNUSABLE else 0.5
    with FaultServer({fault: share}, seed=2, reply=named_reply, huge_bytes=3_000_000, hang=20) as server:
        timeout = 0.4 if fault in ("hang", "trickle") else 30
        generator = OpenAIGenerator("tiny", base_url=server.url, api=api, timeout=timeout, max_retries=0)
        draws = drawn(generator, PROMPTS[:5], 1, how)
    failed = [draw for draw in draws if draw.error is not None]
    assert 0 < len(failed) < 5
    for draw in failed:
        assert str(draw.error).startswith(f"{name}: ")
        assert told in str(draw.error)
        assert issubclass(getattr(errors, name), errors.GenerationError)
        assert draw.texts == []
    for prompt, draw in zip(PROMPTS, draws, strict=False):
        if draw.error is None:
            assert draw.texts[0].startswith(prompt)


def test_the_client_alone_retries():
    with FaultServer({"500": 1.0}) as server:
        (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, max_retries=1), ["Hi"], 1)
        assert (draw.calls, len(server.requests)) == (1, 2)
        (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, max_retries=0), ["Hi"], 4)
        assert (draw.calls, len(server.requests)) == (1, 3)
        server.faults = {}
        (draw,) = drawn(OpenAIGenerator("tiny", base_url=server.url, max_retries=0), ["Hi"], 4)
        assert draw.error is None


def test_what_was_made_before_an_error_is_kept():
    with FaultServer({"500": 0.4}, n="ignore", seed=1) as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, n_per_call=1, max_retries=0)
        draws = drawn(generator, PROMPTS, 4)
    assert any(draw.error is not None and 0 < len(draw.texts) < 4 for draw in draws)
    refiner = wrap(None, LinearFlow(), encoder=LetterEncoder())
    refiner.generator = generator
    assert all(len(draw.texts) == 4 for draw in draws if draw.error is None)


def test_unusable_outputs_are_drawn_again_and_counted():
    with FaultServer({"blank": 0.5}, seed=3) as server:
        draws = drawn(OpenAIGenerator("tiny", base_url=server.url, n_per_call=1), PROMPTS, 4)
    assert all(len(draw.texts) == 4 for draw in draws if draw.error is None and draw.dropped < 4)
    assert sum(draw.dropped for draw in draws) > 0
    assert all(draw.calls <= 8 for draw in draws)


@pytest.mark.parametrize(
    ("prompt", "options", "name", "told"),
    [
        ("Hi", {"model": "huge"}, "UnknownModelError", "no model 'huge'"),
        ("x" * 2000, {}, "ContextTooLongError", "maximum context length"),
        ([], {}, "RequestRefusedError", "messages must not be empty"),
        ("Hi", {"base_url": "/nowhere"}, "EndpointError", "most end in /v1"),
        ("Hi", {"base_url": "http://127.0.0.1:9/v1"}, "EndpointError", "nothing answers"),
        ("Hi", {"base_url": "http://no-such-host.invalid/v1"}, "EndpointError", "nothing answers"),
    ],
)
def test_a_mistake_of_the_user_is_named(prompt, options, name, told):
    with FaultServer(context=1000) as server:
        base_url = options.get("base_url", "")
        base_url = base_url if base_url.startswith("http") else server.url + base_url
        generator = OpenAIGenerator(options.get("model", "tiny"), base_url=base_url, max_retries=0)
        for how in ("sync", "async"):
            bad, good = drawn(generator, [prompt, "Hi"], 2, how)
            assert str(bad.error).startswith(f"{name}: ")
            assert told in str(bad.error)
            assert (good.error is None) == (prompt != "Hi")


@pytest.mark.parametrize(
    ("status", "body", "name"),
    [
        (404, {"error": {"message": 'model "x" not found, try pulling it first'}}, "UnknownModelError"),  # Ollama
        (404, {"object": "error", "message": "The model `x` does not exist.", "code": 404}, "UnknownModelError"),
        (400, {"error": {"message": "invalid model ID", "type": "invalid_request_error"}}, "UnknownModelError"),
        (404, {"detail": "Not Found"}, "EndpointError"),
        (
            400,
            {"error": {"code": 400, "message": "the request exceeds the available context size. try increasing it"}},
            "ContextTooLongError",
        ),
        (
            400,
            {"object": "error", "message": "This model's maximum context length is 8 tokens. However, you requested"},
            "ContextTooLongError",
        ),
        (
            400,
            {"error": {"message": "The response was filtered", "code": "content_filter", "status": 400}},
            "ContentFilterError",
        ),
        (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "RateLimitError"),
        (403, {"error": {"message": "Country not supported"}}, "KeyRefusedError"),
        (400, {"error": {"message": "Unsupported parameter: 'temperature'"}}, "RequestRefusedError"),
        (503, {"error": "loading"}, "ServerError"),
        (500, "<html>oops</html>", "ServerError"),
    ],
)
def test_the_words_of_other_servers_are_understood(status, body, name, monkeypatch):
    from support.fault_server import _Handler

    def refuse(self, *_):
        text = body if isinstance(body, str) else json.dumps(body)
        self._send_bytes(status, text.encode(), "text/html" if isinstance(body, str) else "application/json")

    monkeypatch.setattr(_Handler, "_answer", refuse)
    with FaultServer() as server:
        (draw,) = drawn(OpenAIGenerator("x", base_url=server.url, max_retries=0), ["Hi"], 1)
    assert str(draw.error).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        ({"model": ""}, ValueError, "model must be a name"),
        ({"temprature": 1}, TypeError, "extra_body={'temprature'"),
        ({"top_k": 4}, TypeError, "extra_body={'top_k'"),
        ({"n": 4}, ValueError, "n cannot be set"),
        ({"stream": True}, ValueError, "stream cannot be set"),
        ({"seed": 0.5}, ValueError, "seed must be a whole number"),
        ({"concurrency": 0}, ValueError, "concurrency must be"),
        ({"n_per_call": 0}, ValueError, "n_per_call must be"),
        ({"max_calls": 0}, ValueError, "max_calls must be"),
        ({"max_tokens_total": True}, ValueError, "max_tokens_total must be"),
        ({"api": "assistants"}, ValueError, "api must be one of chat, responses"),
        ({"base_url": "localhost:8000"}, ValueError, "such as http://localhost:8000/v1"),
        ({"base_url": "http://me:pass@host/v1"}, ValueError, "must not hold a password"),
        ({"base_url": f"http://host/v1?token={KEY}"}, ValueError, "must not hold a query"),
        ({"extra_query": {"api-key": KEY}}, ValueError, "extra_query must not hold api-key"),
        ({"base_url": None}, errors.MissingKeyError, "set OPENAI_API_KEY"),
        ({"base_url": None, "client": object()}, TypeError, "client must be an openai.OpenAI"),
        ({"client": openai.OpenAI(api_key="k")}, ValueError, "not both"),
        ({"base_url": None, "client": openai.AsyncOpenAI(api_key="k")}, TypeError, "client must be an openai.OpenAI"),
        ({"base_url": None, "async_client": openai.OpenAI(api_key="k")}, TypeError, "async_client must be"),
        ({"api": "responses", "max_tokens": 5}, TypeError, "max_tokens"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, kind, told):
    with pytest.raises(kind, match=told.replace("{", r"\{")) as caught:
        OpenAIGenerator(**({"model": "tiny", "base_url": "http://127.0.0.1:9/v1"} | arguments))
    assert "me:pass" not in str(caught.value)
    assert KEY not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(("n", "whole"), [("obey", 3), ("ignore", 0)])
def test_a_budget_of_calls_stops_cleanly_and_keeps_what_was_made(n, whole, how):
    with FaultServer(n=n) as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, max_calls=3, concurrency=2)
        draws = drawn(generator, PROMPTS, 4, how)
        assert len(server.requests) == generator.calls == 3
        assert sum(len(draw.texts) for draw in draws) == (12 if n == "obey" else 3)
        assert sum(draw.error is None for draw in draws) == whole
        for draw in draws:
            assert draw.error is None or draw.error == "BudgetError: the budget of max_calls=3 is spent"
        assert sum(draw.calls for draw in draws) == 3
        assert len(draws) == 8


@pytest.mark.parametrize("usage", [True, False])
def test_a_budget_of_tokens_holds_even_where_the_server_does_not_count(usage):
    with FaultServer(usage=usage) as server:
        generator = OpenAIGenerator("tiny", base_url=server.url, max_tokens_total=100, concurrency=1)
        draws = drawn(generator, PROMPTS, 4)
        assert 1 < len(server.requests) < 8
    assert (generator.usage.get("total_tokens", 0) >= 100) == usage
    assert draws[0].error is None
    assert str(draws[-1].error).startswith("BudgetError: the budget of max_tokens_total=100 is spent")


# ------------------------------------------------------------------------------------------------ clients and keys


def test_ready_clients_are_used_in_both_ways():
    with FaultServer(key=KEY) as server:
        ready: dict[str, Any] = {"base_url": server.url, "api_key": KEY}
        with openai.OpenAI(**ready) as client:
            generator = OpenAIGenerator("tiny", client=client)
            for how in ("sync", "async", "sync"):
                assert all(draw.error is None for draw in drawn(generator, PROMPTS, 2, how))
        generator = OpenAIGenerator("tiny", async_client=openai.AsyncOpenAI(**ready))
        for _ in range(2):
            assert all(draw.error is None for draw in drawn(generator, PROMPTS, 2))

        async def own_loop() -> None:
            async with openai.AsyncOpenAI(**ready) as client:
                with_client = OpenAIGenerator("tiny", async_client=client)
                for _ in range(2):
                    assert all([draw.error is None async for draw in with_client.adraws(PROMPTS, 2)])

        asyncio.run(own_loop())
        assert {authorization for _, authorization, _ in server.requests} == {f"Bearer {KEY}"}


def test_a_generator_can_be_used_in_one_loop_after_another():
    with FaultServer() as server:
        generator = OpenAIGenerator("tiny", base_url=server.url)
        for _ in range(3):
            assert drawn(generator, ["Hi"], 2, "async")[0].error is None


def test_a_local_server_needs_no_key_and_never_sees_that_of_openai(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultServer() as server:
        drawn(OpenAIGenerator("tiny", base_url=server.url), ["Hi"], 1)
        drawn(OpenAIGenerator("tiny", base_url=server.url, api_key="own"), ["Hi"], 1)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        drawn(OpenAIGenerator("tiny"), ["Hi"], 1)
        assert [authorization for _, authorization, _ in server.requests] == [
            "Bearer none",
            "Bearer own",
            f"Bearer {KEY}",
        ]
    assert OpenAIGenerator("tiny", base_url="https://api.openai.com/v1").base_url == "https://api.openai.com/v1"


def test_no_key_is_in_any_log_cache_repr_pickle_or_traceback(tmp_path, caplog, capfd, monkeypatch):
    """A server that quotes the wrong key in its errors, debug logs on, every road on which a key could leave."""
    monkeypatch.setenv("OPENAI_LOG", "debug")
    shown: list[str] = []
    with caplog.at_level(logging.DEBUG), FaultServer({"500": 0.3}, key="another key") as server:
        for key in (KEY, None):
            options: dict[str, Any] = {"extra_headers": {"X-Api-Key": KEY}, "extra_body": {"api_key": KEY, "top_k": 1}}
            generator = OpenAIGenerator(
                "tiny", base_url=server.url, api_key=key, cache=tmp_path, max_retries=1, **options
            )
            for how in ("sync", "async"):
                shown += [str(draw) for draw in drawn(generator, PROMPTS[:3], 2, how)]
            server.key = None
            for how in ("sync", "async"):
                shown += [str(draw) for draw in drawn(generator, PROMPTS, 2, how)]
            server.key = "another key"
            shown += [repr(generator), json.dumps(generator.describe()), repr(generator._endpoint)]
        generator.parameters.clear()
        shown.append(pickle.dumps(generator).decode("latin-1"))
        try:
            OpenAIGenerator("tiny", base_url=f"http://me:{KEY}@127.0.0.1:9/v1", api_key=KEY)
        except ValueError:
            shown.append(traceback.format_exc().split("\nValueError")[1])
        refiner = wrap(generator, LinearFlow(), encoder=LetterEncoder())
        with pytest.raises(errors.GenerationError) as caught:
            refiner("Hi there")
        shown.append("".join(traceback.format_exception(caught.value)))
    assert "KeyRefusedError" in " ".join(shown)
    assert KEY not in " ".join(shown)
    logged = " ".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records)
    assert "chat/completions" in logged
    assert f"Bearer {KEY}" not in logged
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert all(KEY.encode() not in path.read_bytes() for path in files)
    output = capfd.readouterr()
    assert KEY not in output.out + output.err


def test_a_generator_survives_pickle_without_its_key(monkeypatch):
    with FaultServer() as server:
        monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        generator = OpenAIGenerator("tiny", api_key=KEY, seed=1)
        (before,) = drawn(generator, ["Hi"], 2)
        again = pickle.loads(pickle.dumps(generator))
        (after,) = drawn(again, ["Hi"], 2)
        assert after.texts == before.texts
        assert [authorization for _, authorization, _ in server.requests] == [
            f"Bearer {KEY}",
            "Bearer of the environment",
        ]


def test_closing_the_iterator_does_not_wait_for_a_server_that_hangs():
    def reply(messages: list[dict[str, Any]], number: int) -> str:
        while not server.outcomes["hang"]:
            time.sleep(0.005)
        return default_reply(messages, number)

    with FaultServer({"hang": 0.5}, seed=2, hang=600, reply=reply) as server:
        for _ in OpenAIGenerator("tiny", base_url=server.url, max_retries=0).draws(PROMPTS, 1):
            break
        assert server.under_way >= server.outcomes["hang"] > 0


# ------------------------------------------------------------------------------------------------- in the refiner


def refiner_of(generator: Any, n: int = 2):
    return wrap(generator, LinearFlow(), encoder=LetterEncoder(), n=n)


def test_abatch_is_concurrent_keeps_the_order_and_calls_back(monkeypatch):
    monkeypatch.setattr("pfm.refiner.run.WAITING_SECONDS", 0.05)
    saved = []
    go_on = threading.Event()

    def reply(messages: list[dict[str, Any]], number: int) -> str:
        assert go_on.wait(60)
        return named_reply(messages, number)

    with FaultServer(reply=reply) as server:
        refiner = refiner_of(OpenAIGenerator("tiny", base_url=server.url, concurrency=16))

        async def work():
            task = asyncio.create_task(refiner.abatch(PROMPTS * 2, progress=False, on_result=saved.append))
            while server.most_at_once < 16 and not task.done():  # the event loop goes on meanwhile
                await asyncio.sleep(0.005)
            go_on.set()
            return await task

        results = asyncio.run(work())
        assert server.most_at_once == 16
    assert [result.prompt for result in results] == PROMPTS * 2
    assert all(result.original.startswith(str(result.prompt)) for result in results)
    assert saved == results
    assert results[0].usage["total_tokens"] > 0
    assert results[0].to_dict()["usage"] == results[0].usage


def test_an_async_function_is_a_generator_too():
    running, most = 0, 0

    async def reply(prompt: str) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        if "3" in prompt:
            raise ConnectionError("no answer")
        return prompt + "a"

    generator = as_generator(reply)
    assert isinstance(generator, AsyncCallableGenerator)
    for how in ("sync", "async"):
        draws = drawn(generator, PROMPTS, 2, how)
        assert [draw.error for draw in draws] == [None] * 3 + ["ConnectionError: no answer"] + [None] * 4
        assert [draw.texts for draw in draws if not draw.error] == [[p + "a"] * 2 for p in PROMPTS if "3" not in p]
        assert most == 8
    results = asyncio.run(refiner_of(reply).abatch(PROMPTS, progress=False))
    assert [result.prompt for result in results] == PROMPTS
    assert sum(result.error is not None for result in results) == 1

    async def several(prompt: str, n: int) -> list[str]:
        return [prompt] * min(n, 3)

    assert [draw.calls for draw in drawn(as_generator(several), PROMPTS, 4, "async")] == [2] * 8
    with pytest.raises(TypeError, match="got an async function that yields"):
        as_generator(default_generator)


async def default_generator(prompt: str):
    yield default_reply([{"content": prompt}], 0)


def test_an_interrupted_abatch_has_handed_over_what_is_finished(monkeypatch):
    monkeypatch.setattr("pfm.refiner.run.WAITING_SECONDS", 0.0)

    async def reply(prompt: str) -> str:
        await asyncio.sleep(0 if prompt < "Question 3" else 60)
        return prompt

    done = []

    async def work() -> None:
        task = asyncio.create_task(refiner_of(reply, 1).abatch(PROMPTS, progress=False, on_result=done.append))
        while len(done) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(work(), 30))
    assert [result.prompt for result in done] == PROMPTS[:3]


def test_candidates_are_others_than_those_of_the_batch():
    with FaultServer(reply=named_reply) as server:
        refiner = refiner_of(OpenAIGenerator("tiny", base_url=server.url, seed=0))
        batch = refiner.batch(["Hi", "Ho", "Hi"], progress=False)
        fresh = refiner.candidates(["Hi", "Ho", "Hi"], 2)
    used = [text for result in batch for text in result.candidates]
    assert used == ["Hi 0", "Hi 1", "Ho 0", "Ho 1", "Hi 2", "Hi 3"]
    assert [text for row in fresh for text in row] == ["Hi 4", "Hi 5", "Ho 2", "Ho 3", "Hi 6", "Hi 7"]


def test_a_prompt_that_cannot_be_sent_is_not_called_a_bad_answer():
    with FaultServer() as server:
        (draw,) = OpenAIGenerator("m", base_url=server.url, cache=False).draws(["cut \ud83d"], 1)
    assert str(draw.error).startswith("GenerationError: the request cannot be sent, since it holds half of a character")
