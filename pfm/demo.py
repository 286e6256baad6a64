"""A real language model behind the proxy, on this machine alone: what a client sees with and without refinement.

The model is served by ``transformers serve``, which needs no package beyond those of the library. It decodes one
request at a time, about 15 tokens a second on one core (AMD EPYC, bfloat16), and ignores ``n``, so that the proxy asks
once for each candidate. llama.cpp's server would have to be compiled: llama-cpp-python is published without wheels.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfm._internal.child import running_child
from pfm._internal.smollm2 import has_bfloat16, smollm2_folder
from pfm.encoders import encoder_from_name
from pfm.quickstart import ENCODER, fit_example, load_example

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PROMPTS", "Answer", "run", "serving"]

PROMPTS = (
    "How do I get red wine out of a carpet?",
    "Write three sentences that invite neighbours to a street party.",
    "What should I check before I buy a used bicycle?",
    "Give me a plan for learning to touch-type in one month.",
)
START_SECONDS = 180.0
# The children must not ask a hub or go through a proxy, and threads that wait yield the core.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", "NO_PROXY": "127.0.0.1"}


@dataclass(frozen=True)
class Answer:
    """What a client of the proxy got for one prompt.

    Attributes:
        prompt: the question. text: the answer.
        original: the model's first candidate, which it would have got without the proxy.
        probabilities: b of the original and of the answer.
        candidates: how many different texts there were.
        changed: whether the answer is another than the original. reason: why.
        tokens: that the model wrote for all candidates. seconds: of the whole request.
    """

    prompt: str
    text: str
    original: str
    probabilities: tuple[float, float]
    candidates: int
    changed: bool
    reason: str
    tokens: int
    seconds: float


@contextlib.contextmanager
def serving(flow: Path, folder: Path, *, encoder: str | None = None) -> Iterator[tuple[str, str]]:
    """Serve SmolLM2 by ``transformers serve``, with ``pfm serve`` before it, each on a free port of loopback.

    Both are child processes, and end with this block or with this process, however that ends.

    Args:
        flow: folder of the flow.
        folder: for the logs of both.
        encoder: of the flow; None takes the one that it names.

    Yields:
        The base URLs of the model's server and of the proxy.

    Raises:
        ImportError, ValueError, OSError: the model cannot be loaded or unpacked.
        ChildProcessError: a server does not start; the message holds the end of its log.
    """
    model = smollm2_folder()
    hub = folder / "hub"  # the server lists what the hub's cache holds, and fails where there is none
    hub.mkdir(exist_ok=True)
    environment = _ENVIRONMENT | {"HF_HUB_CACHE": str(hub)}
    serve_model = ["serve", str(model), "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    serve_model += ["--dtype", "bfloat16" if has_bfloat16() else "float32"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            running_child(
                "transformers.cli.transformers:app",
                serve_model,
                log=folder / "model.log",
                what="the model's server (transformers serve)",
                environment=environment,
            )
        )
        upstream = server.wait_for("running on ", " ", START_SECONDS).rstrip("/") + "/v1"
        serve_flow = ["serve", str(flow), "--upstream", upstream, "--port", "0", "--model-name", str(model)]
        proxy = stack.enter_context(
            running_child(
                "pfm.cli:main",
                [*serve_flow, *([] if encoder is None else ["--encoder", encoder])],
                log=folder / "proxy.log",
                what="the proxy (pfm serve)",
                environment=environment,
            )
        )
        yield upstream, proxy.wait_for(f"refining {upstream} on ", "\n", START_SECONDS)


def ask(url: str, prompt: str, n: int, max_tokens: int) -> Answer:
    """Ask the proxy by the official client.

    Raises:
        ConnectionError: it does not answer, or answers with an error.
    """
    import openai

    started = time.perf_counter()
    with openai.OpenAI(
        base_url=url, api_key="none", timeout=600, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as client:
        try:
            answer = client.chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_tokens,
                extra_body={"pfm": {"n": n}},
            )
        except openai.OpenAIError as error:
            raise ConnectionError(f"the proxy on {url} gave no answer: {error}") from error
    evidence: dict[str, Any] = (answer.model_extra or {})["pfm"]
    text = answer.choices[0].message.content or ""
    drawn = evidence.get("candidates") or [text]
    b = evidence.get("probabilities") or [float("nan")]
    return Answer(
        prompt,
        text,
        drawn[0],
        (b[0], b[evidence.get("index", 0)]),
        len(set(drawn)),
        evidence["changed"],
        evidence["reason"],
        0 if answer.usage is None else answer.usage.completion_tokens,
        time.perf_counter() - started,
    )


def run(
    prompts: Sequence[str] = PROMPTS,
    *,
    n: int = 4,
    max_tokens: int = 48,
    flow: Path | None = None,
    encoder: str = ENCODER,
    console: Console | None = None,
    progress: bool = True,
) -> list[Answer]:
    """Show what refinement changes in the answers of a real model; nothing leaves this machine.

    Args:
        prompts: questions.
        n: candidates a prompt. max_tokens: of each.
        flow: folder of a fitted flow; None fits one on the shipped preferences.
        encoder: name of the encoder, where the flow is fitted here.
        console: where to print; None for standard output.
        progress: show a progress bar while encoding.

    Raises:
        ImportError: a part is not installed; the message says how to install it.
        ValueError, OSError: the model, the flow or a server cannot be used.
    """
    from rich.console import Console

    console = console or Console()
    started = time.perf_counter()
    if flow is not None and not flow.is_dir():
        raise ValueError(f"flow must be the folder of a fitted flow: there is no folder {str(flow)!r}")
    smollm2_folder()  # what is missing shows before anything else is done
    _say(console, f"SmolLM2-135M-Instruct is unpacked and checked ({time.perf_counter() - started:.0f} s)")
    with tempfile.TemporaryDirectory(prefix="pfm-demo-") as name:
        folder, started = Path(name), time.perf_counter()
        if flow is None:
            data, flow = load_example(), folder / "flow"
            fit_example(data.pairs.encode(encoder_from_name(encoder), progress=progress)).save_pretrained(flow)
            _say(
                console,
                f"a flow is fitted on {len(data.pairs):,} example preferences ({time.perf_counter() - started:.0f} s)",
            )
        started = time.perf_counter()
        with serving(flow, folder) as (upstream, url):
            _say(console, f"the model's server listens on {upstream} (transformers serve)")
            _say(
                console,
                f"the proxy listens on {url} (pfm serve; both started in {time.perf_counter() - started:.0f} s)",
            )
            answers = []
            for prompt in prompts:
                answers.append(ask(url, prompt, n, max_tokens))
                _show(console, answers[-1])
        _say(console, "both servers are stopped")
    _summarise(console, answers, n)
    return answers


def _say(console: Console, text: str) -> None:
    from rich.text import Text

    console.print(Text(text, "dim"), soft_wrap=True)


def _show(console: Console, answer: Answer) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print()
    console.print(Text(answer.prompt, "bold"))
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="")
    for name, b in zip(("without", "with pfm serve"), answer.probabilities, strict=True):
        table.add_column(Text.assemble((name, "cyan"), ("" if math.isnan(b) else f"  b {b:.2f}", "dim")), ratio=1)
    table.add_row(Text(answer.original), Text(answer.text if answer.changed else "(the same)"))
    console.print(table)
    console.print(Text(f"{answer.reason}; {answer.tokens} tokens in {answer.seconds:.0f} s", "dim"))


def _summarise(console: Console, answers: Sequence[Answer], n: int) -> None:
    changed = sum(answer.changed for answer in answers)
    tokens, seconds = sum(answer.tokens for answer in answers), sum(answer.seconds for answer in answers)
    console.print()
    _say(
        console,
        f"{changed} of {len(answers)} answers changed, chosen among {n} candidates each; {tokens} tokens in "
        f"{seconds:.0f} s, {tokens / max(seconds, 1e-9):.0f} a second. b is the flow's own estimate; "
        "pfm evaluate measures whether a judge agrees.",
    )
