"""Adapters for other libraries: their numbers are the flow's own, and the real libraries take them.

A test that needs a library skips where it is not installed. Tested with dspy 3.4.1, inspect_ai 0.3.285 and
langchain_core 1.8.4.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import re
import subprocess
import sys
from typing import Any

import pytest
from support.chat_server import ChatServer, running
from support.places import ROOT
from support.proxy import fitted

import pfm
from pfm.integrations import FlowScorer, dspy_metric, inspect_scorer, langchain_runnable, trl_reward

ENCODER = pfm.encoders.SurfaceEncoder()
PROMPT = "Question 1?"
BAD, GOOD = f"{PROMPT}: river lamp wind!!!", f"{PROMPT}: Garden bridge stone cloud."


@pytest.fixture(scope="module")
def flow() -> pfm.PreferenceFlow:
    return fitted()


def b_of(flow: pfm.PreferenceFlow, texts: list[str]) -> list[float]:
    return flow.win_probability(ENCODER.encode(texts), ENCODER.encode_prompts([PROMPT] * len(texts))).tolist()


def chat(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


# -------------------------------------------------------------------------------------------------- the common scorer


def test_scores_are_b_and_nothing_scores_0(flow):
    scorer = FlowScorer(flow, ENCODER)
    low, high = b_of(flow, [BAD, GOOD])
    found = scorer([PROMPT, chat(PROMPT), PROMPT, PROMPT, PROMPT], [BAD, GOOD, "", " \n", "<think>half a thought"])
    assert found == pytest.approx([low, high, 0, 0, 0], abs=1e-6)
    assert low < 0.5 < high
    assert scorer([], []) == scorer([PROMPT] * 2, ["", " "])[:0]


@pytest.mark.parametrize(
    ("prompts", "answers", "error", "told"),
    [
        ([PROMPT], ["a", "b"], ValueError, "equally many, got 1 and 2"),
        ([PROMPT, PROMPT], ["a", None], TypeError, r"answers\[1\] must be a text, got NoneType"),
        ([PROMPT], ["a\ud800"], ValueError, r"answers\[0\] is no valid Unicode"),
        ([" "], ["a"], ValueError, r"prompts\[0\] must be text"),
        ([5], ["a"], TypeError, r"prompts\[0\] must be a text or a list of messages"),
    ],
)
def test_mistakes_name_row_and_way_out(flow, prompts, answers, error, told):
    with pytest.raises(error, match=told):
        FlowScorer(flow, ENCODER)(prompts, answers)


def test_importing_the_adapters_imports_none_of_the_libraries():
    code = (
        "import sys, pfm.integrations as found; [getattr(found, name) for name in found.__all__]; "
        "print({'trl', 'dspy', 'inspect_ai', 'langchain_core'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------------------- TRL


def test_a_reward_function_takes_both_of_trls_formats(flow):
    reward = trl_reward(flow, ENCODER, name="taste")
    wanted = pytest.approx(b_of(flow, [BAD, GOOD]), abs=1e-6)
    columns = {"completion_ids": [[1], [2]], "trainer_state": None, "log_extra": print, "ground_truth": ["", ""]}
    assert reward(prompts=[PROMPT] * 2, completions=[BAD, GOOD], **columns) == wanted
    assert reward([chat(PROMPT)] * 2, [chat(BAD, "assistant"), chat(GOOD, "assistant")]) == wanted
    assert reward([chat(PROMPT)] * 2, [[{"content": BAD}], [{"content": GOOD}]]) == wanted
    assert reward.__name__ == "taste"
    assert all(type(value) is float for value in reward([PROMPT], [GOOD]))


def test_log_odds_are_finite_and_keep_the_order(flow):
    found = trl_reward(flow, ENCODER, scale="log_odds")([PROMPT] * 3, ["", BAD, GOOD])
    assert found[0] == pytest.approx(math.log(1e-6 / (1 - 1e-6)))
    assert found[1:] == pytest.approx([math.log(b / (1 - b)) for b in b_of(flow, [BAD, GOOD])], abs=1e-4)
    with pytest.raises(ValueError, match="scale must be one of probability, log_odds: got 'raw'"):
        trl_reward(flow, ENCODER, scale="raw")


@pytest.mark.parametrize("completion", [None, 5, [], [5], [{"role": "assistant", "content": 5}], {"content": "a"}])
def test_a_completion_that_is_no_text_is_named(flow, completion):
    with pytest.raises(TypeError, match=r"completions\[0\]"):
        trl_reward(flow, ENCODER)([PROMPT], [completion])


def test_a_call_of_a_tool_is_no_answer(flow):
    call = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert trl_reward(flow, ENCODER)([chat(PROMPT)], [call]) == [0]


# --------------------------------------------------------------------------------------------------------------- DSPy


def test_a_metric_is_b_and_with_a_trace_a_threshold(flow):
    metric = dspy_metric(flow, ENCODER, answer="reply")
    (b,) = b_of(flow, [GOOD])
    assert metric({"question": PROMPT}, {"reply": GOOD}) == pytest.approx(b, abs=1e-6)
    assert metric({"question": PROMPT}, {"reply": GOOD}, []) is True
    assert metric({"question": PROMPT}, {"reply": BAD}, trace=[]) is False
    with pytest.raises(TypeError, match="prediction must have a text in field 'reply', got NoneType; its fields are a"):
        metric({"question": PROMPT}, {"a": GOOD})
    with pytest.raises(ValueError, match=r"threshold must .*: got 2"):
        dspy_metric(flow, ENCODER, threshold=2)


def test_dspy_evaluates_with_the_metric(flow):
    dspy = pytest.importorskip("dspy", reason="dspy is not installed")

    class Fixed(dspy.Module):
        def forward(self, question):
            return dspy.Prediction(answer=GOOD if question == PROMPT else BAD)

    examples = [dspy.Example(question=asked).with_inputs("question") for asked in (PROMPT, "Question 2?")]
    evaluate = dspy.Evaluate(devset=examples, metric=dspy_metric(flow, ENCODER), num_threads=1, display_progress=False)
    found = evaluate(Fixed())
    scores = [score for _, _, score in found.results]
    assert scores[0] == pytest.approx(b_of(flow, [GOOD])[0], abs=1e-6)
    assert found.score == pytest.approx(100 * sum(scores) / 2, abs=0.01)


# --------------------------------------------------------------------------------------------------------- inspect_ai


def test_inspect_scores_samples_and_means(flow, tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")
    from inspect_ai.dataset import Sample  # pyright: ignore[reportMissingImports]
    from inspect_ai.model import ChatMessageUser, ModelOutput, ModelUsage, get_model  # pyright: ignore[reportMissingImports]

    outputs = [ModelOutput.from_content("mockllm/model", text) for text in (BAD, GOOD)]
    for output in outputs:
        output.usage = ModelUsage()  # else its tokens are counted with a table that is fetched
    samples = [Sample(input=PROMPT, target=""), Sample(input=[ChatMessageUser(content=PROMPT)], target="")]
    task = inspect_ai.Task(dataset=samples, scorer=inspect_scorer(flow, ENCODER))
    (log,) = inspect_ai.eval(
        task,
        model=get_model("mockllm/model", custom_outputs=outputs),
        log_dir=str(tmp_path),
        display="none",
        max_samples=1,
    )
    assert log.status == "success", log.error
    scores = [sample.scores["pfm_win_probability"].value for sample in log.samples]
    wanted = b_of(flow, [BAD, GOOD])
    assert scores == pytest.approx(wanted, abs=1e-6)
    metrics = {name: metric.value for name, metric in log.results.scores[0].metrics.items()}
    assert metrics["mean"] == pytest.approx(sum(wanted) / 2, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- LangChain


def test_langchain_runs_a_refined_endpoint_in_a_chain(flow):
    pytest.importorskip("langchain_core", reason="langchain_core is not installed")
    from langchain_core.messages import AIMessage, HumanMessage  # pyright: ignore[reportMissingImports]
    from langchain_core.output_parsers import StrOutputParser  # pyright: ignore[reportMissingImports]
    from langchain_core.prompts import ChatPromptTemplate  # pyright: ignore[reportMissingImports]

    with running(ChatServer().app) as url:
        generator = pfm.generators.OpenAIGenerator("heeds-n", base_url=url, api_key="none", cache=None)
        runnable = langchain_runnable(pfm.wrap(generator, flow, encoder=ENCODER, n=4, margin=0.0))
        message = runnable.invoke(PROMPT)
        assert isinstance(message, AIMessage)
        evidence = message.response_metadata["pfm"]
        assert evidence["changed"]
        assert evidence["win_probability"] == max(evidence["probabilities"])
        assert len(evidence["probabilities"]) == 4
        chain = ChatPromptTemplate.from_messages([("human", "Question {number}?")]) | runnable | StrOutputParser()
        assert chain.invoke({"number": 1}).startswith(PROMPT)
        texts = chain.batch([{"number": 1}, {"number": 2}])
        assert [text.partition(":")[0] for text in texts] == ["Question 1?", "Question 2?"]
        assert asyncio.run(runnable.ainvoke([HumanMessage(PROMPT)])).content.startswith(PROMPT)
        with pytest.raises(TypeError, match="a prompt must be a text, a prompt value or a list of messages, got int"):
            runnable.invoke(5)


def test_without_the_library_the_way_out_is_said(flow, monkeypatch):
    for name in ("inspect_ai", "langchain_core"):
        monkeypatch.setitem(sys.modules, name, None)
        for part in ("scorer", "solver", "messages", "runnables"):
            monkeypatch.setitem(sys.modules, f"{name}.{part}", None)
    with pytest.raises(ImportError, match="pip install inspect-ai"):
        inspect_scorer(flow, ENCODER)
    refiner: Any = pfm.wrap(None, flow, encoder=ENCODER)
    with pytest.raises(ImportError, match="pip install langchain-core"):
        langchain_runnable(refiner)


# --------------------------------------------------------------------------------------------------------- the page


def test_the_snippets_of_the_page_run_where_their_library_is(capsys):
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 5
    known: dict[str, Any] = {}
    for snippet in snippets:
        needed = {name for name in ("dspy", "inspect_ai") if f"import {name}" in snippet or f"from {name}" in snippet}
        needed |= {"langchain_core"} if "langchain_runnable" in snippet else set()
        if all(importlib.util.find_spec(name) for name in needed):
            exec(compile(snippet, "docs/integrations.md", "exec"), known)
    assert 0 < float(capsys.readouterr().out.split()[0].strip("[]")) < 1
