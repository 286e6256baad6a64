"""Hidden reasoning: where it ends in a text, and that what follows is judged wherever outputs are judged."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
import torch
from fastapi import FastAPI
from support.chat_server import running
from support.command_line import read_rows, run, write_rows
from support.letters import LetterEncoder, LinearFlow, refine_one

import pfm
from pfm import PreferencePairs
from pfm.decoders import ExemplarBank
from pfm.generators import OpenAIGenerator
from pfm.judges import LLMJudge, ScriptedJudge
from pfm.reasoning import answer_of, judged_text, read_content, split_reasoning, training_text
from pfm.refiner import Refinement, wrap

FINAL = "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"

ANSWERED = {
    "<think>2 + 2</think>\n\nFour.": "Four.",
    "<think>\n\n</think>\n\nFour.": "Four.",
    "\ufeff \n<Thinking>2 + 2</Thinking> Four.": "Four.",
    "<reasoning>2 + 2</reasoning>Four.": "Four.",
    "<think duration='3'>2 + 2</think>Four.": "Four.",
    "<seed:think>2 + 2</seed:think>Four.": "Four.",
    '<details type="reasoning" done="true"><summary>3 s</summary>2 + 2</details>\nFour.': "Four.",
    "[THINK]2 + 2[/THINK]Four.": "Four.",
    "◁think▷2 + 2◁/think▷Four.": "Four.",
    "<|channel>thought\n2 + 2<channel|>Four.": "Four.",
    "<|START_THINKING|>2<|END_THINKING|><|START_RESPONSE|>Four.<|END_RESPONSE|>": "Four.",
    FINAL: "Four.",
    f"<|start|>assistant{FINAL}": "Four.",
    "<|channel|>final <|constrain|>json<|message|>4": "4",
    "analysisThey ask for 2 + 2.assistantfinalFour.": "Four.",
    "Here is my thought process: 2 + 2. Here is my response: Four.": "Four.",
    # Several blocks, blocks within a block, another name at the end.
    "<think>2</think><think>+ 2</think>Four.": "Four.",
    "<think>2 <think>+</think> 2.</think>Four.": "Four.",
    "<thinking>2 + 2</think>Four.": "Four.",
    # The template wrote the opening marker.
    "That is 4.\n</think>\n\nFour.": "Four.",
    "That is 4.</think>Four.": "Four.",
    "so 4</think>\n\nFour.": "Four.",
    "</think>\n\nFour.": "Four.",
    "</think>That is 4.</think>Four.": "Four.",
    # Cut off.
    "<think>2 + 2": "",
    "[THINK]2 + 2": "",
    "<|channel|>analysis<|message|>2 + 2": "",
    "<think>2 + 2</think>\n": "",
    # Markers that the reasoning quotes.
    "<think>Write `</think>` at the end.</think>It ends so.": "It ends so.",
    "<think>What is <think>?</think>The tag </think> closes it.": "The tag </think> closes it.",
}
WHOLE = [
    "Four.",
    "",
    "Use `<think>` and `</think>` around it.",
    "Write <think>2 + 2</think> and then the answer.",
    "End it with </think> and go on.",
    "The closing tag is </think>",
    "```xml\n<think>2 + 2</think>\n```\nThis is how.",
    "First:\n```\n2 + 2.\n</think>\n```\nThen the answer.",
    "<thinkable> is no tag.",
    "analysis of the matter: assistants finalise it",
    "They wrote <think> before it.\n</think>\nFour.",
    "<p>Four.</p>",
]


@pytest.mark.parametrize("text", ANSWERED)
def test_the_answer_after_reasoning_is_found(text):
    assert answer_of(text) == ANSWERED[text]
    split = split_reasoning(text)
    assert split.reasoning
    assert text.startswith(split.reasoning)
    assert judged_text(text, "keep") == text


@pytest.mark.parametrize("text", WHOLE)
def test_a_text_that_quotes_markers_loses_nothing(text):
    assert split_reasoning(text).answer == text
    assert split_reasoning(text).reasoning == ""


def test_a_text_of_nothing_but_markers_is_split_at_once():
    markers = 20_000
    assert answer_of("<think>" * markers) == ""
    assert answer_of("<think>" + "`</think>` " * markers) != ""
    assert answer_of("</think>" * markers) != ""


def test_a_training_output_is_never_empty():
    assert training_text("<think>cut off") == "<think>cut off"
    assert training_text("<think>a</think>b") == "b"


def test_a_content_of_parts_is_read():
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "2 + 2"}]}
    text = {"type": "text", "text": "Four."}
    found = read_content([thinking, text])
    assert found is not None
    assert (found.text, found.reasoning) == ("Four.", "2 + 2")
    assert read_content([text, {"type": "image_url", "image_url": {"url": "x"}}]) is None
    assert read_content([]) is None
    assert read_content("Four.") is None


# --- a refiner ------------------------------------------------------------------------------------------------


def test_the_answer_is_judged_and_what_came_is_handed_on():
    quoting = "<think>I could say aaa.</think>x"  # reasoning that quotes a good answer
    good = "<think>x</think>xaa"
    result = refine_one([quoting, "xa", good])
    assert (result.text, result.original) == (good, quoting)
    assert result.candidates == [quoting, "xa", good]
    assert result.probabilities == refine_one(["x", "xa", "xaa"]).probabilities
    assert result.reasoning == [len(quoting) - 1, 0, len(good) - 3]
    assert "hidden reasoning set aside in 2 of 3 candidates" in result.reason
    assert Refinement.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_setting_keeps_reasoning_in_what_is_judged():
    quoting = "<think>I could say aaa.</think>x"
    kept = refine_one([quoting, "xa"], reasoning="keep")
    assert (kept.text, kept.reasoning) == (quoting, [])
    assert "reasoning" not in kept.to_dict()
    with pytest.raises(ValueError, match=r"reasoning must be 'strip'.*got 'drop'"):
        refine_one(["x"], reasoning="drop")


def test_an_output_cut_off_before_its_answer_never_wins():
    result = refine_one(["<think>aaaa", "x", "xa"])
    assert (result.text, result.index, result.changed) == ("xa", 2, True)
    assert result.probabilities[0] == 0
    assert result.reason.startswith("changed: the original was cut off before its answer")
    assert refine_one(["x", "<think>aaaaaa"]).text == "x"
    alone = refine_one(["<think>aaaa", "x"], LinearFlow(guard_margin=float("inf")))
    assert (alone.text, alone.changed) == ("x", True)


def test_outputs_without_any_answer_keep_the_original_and_say_so():
    result = refine_one(["<think>aaaa", "<think>b"])
    assert (result.text, result.index, result.changed) == ("<think>aaaa", 0, False)
    assert "cut off within its hidden reasoning" in str(result.error)
    assert str(result.error).startswith("EmptyAnswerError: ")


def test_every_rule_and_other_prompts_of_a_batch_are_unharmed():
    refiner = wrap(None, LinearFlow(), encoder=LetterEncoder(), by="combined")
    mixed = refiner.refine([["<think>a", "<think>b"], ["<think>c</think>x", "xac"], ["x", "xa"]], ["p", "q", "r"])
    assert [result.text for result in mixed] == ["<think>a", "xac", "xa"]
    assert [result.error is None for result in mixed] == [False, True, True]


class PreferringA(LinearFlow):
    """Carry nothing anywhere, and confirm every gain."""

    context_dimension = 0

    def transport(self, y, context=None, **_: Any):
        return y


def test_a_rewrite_by_a_reasoning_model_is_judged_by_its_answer():
    encoder, asked = LetterEncoder(), []

    def model(prompt: str, n: int = 1) -> list[str]:
        asked.append(prompt)
        rewrites = [
            "<think>aaaaaa</think>x!",
            "<think>short</think>xaaa",
            "<think>cut off aaaa",
            "<think>y</think>xaaa",
        ]
        return (
            ["<think>secret plan</think>x"] * 4 if "revise" not in prompt.lower() and len(asked) == 1 else rewrites
        )[:n]

    bank = ExemplarBank(["xaa"], encoder.encode(["xaa"]), encoder.describe())
    refiner = wrap(model, PreferringA(), encoder=encoder, decoder="rewrite", n=1, exemplars=bank, rounds=1, rewrites=4)
    result = refiner("p")
    assert result.text == "<think>short</think>xaaa"
    assert len(result.candidates) == 3  # without the one that was cut off, and the one that answers the same
    assert len(result.reasoning) == 3
    assert "secret plan" not in asked[-1]


# --- judges and reports ---------------------------------------------------------------------------------------


def test_judges_judge_the_answer_and_read_their_models_answer():
    judge = ScriptedJudge("a")
    assert judge("p", ["<think>aaaa</think>x", "xa", "<think>aa"]) == [0, 1, 0]
    assert judge.judge("p", "<think>aaaa</think>x", "xa").probability == 0
    judge.reasoning = "keep"
    assert judge("p", ["<think>aaaa</think>x", "xa"]) == [4, 1]
    seen = []

    def model(prompt: str) -> str:
        seen.append(prompt)
        answer = "A" if prompt.index("bad one") > prompt.index("good one") else "B"
        return f"<think>VERDICT: A or VERDICT: B?\nVERDICT: {'B' if answer == 'A' else 'A'}</think>\nVERDICT: {answer}"

    verdict = LLMJudge(model).judge("p", "<think>private</think>good one", "bad one")
    assert verdict.probability == 1
    assert not any("private" in prompt for prompt in seen)


def test_labels_are_of_answers_that_differ():
    row = {"prompt": "p", "candidates": ["<think>1</think>xa", "<think>2</think>xa", "x"]}
    labelled = ScriptedJudge("a").label([row])
    assert [(row["chosen"], row["rejected"]) for row in labelled] == [("<think>1</think>xa", "x")]


def test_an_evaluation_judges_and_measures_answers():
    long = "<think>" + "reason " * 50 + "</think>"
    records = wrap(None, LinearFlow(), encoder=LetterEncoder()).refine([[f"{long}x", f"{long}xaa"]] * 2, ["p", "q"])
    seen: list[list[str]] = []

    def judge(prompt: Any, responses: list[str]) -> list[float]:
        seen.append(responses)
        return [float(text.count("a")) for text in responses]

    report = pfm.evaluate(records, judge=judge, progress=False)
    assert seen == [["x", "xaa"]] * 2
    assert report.row("pfm").length_ratio.value == 3
    kept = pfm.evaluate(records, judge=judge, reasoning="keep", progress=False)
    assert seen[-1] == [f"{long}x", f"{long}xaa"]
    assert kept.row("pfm").length_ratio.value < 1.1


# --- a server of a reasoning model, the generator and the proxy -----------------------------------------------

PLANS = {
    "inline": lambda good: {"content": f"<think>aaaa</think>{good}"},
    "field": lambda good: {"content": good, "reasoning_content": "aaaa"},
    "reasoning": lambda good: {"content": good, "reasoning": "aaaa"},
    "parts": lambda good: {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "aaaa"}]},
            {"type": "text", "text": good},
        ]
    },
    "cut": lambda good: {"content": "<think>aaaa" if good == "x" else good},
    "all-cut": lambda good: {"content": "<think>aaaa"},
    "empty": lambda good: {"content": None, "reasoning_content": "aaaa"},
}


def reasoning_app() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> dict[str, Any]:
        texts = ["x", "xaaa", "xa", "xb"]
        messages = [PLANS[body["model"]](texts[number % 4]) for number in range(body.get("n") or 1)]
        choices = [
            {"index": number, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
            for number, message in enumerate(messages)
        ]
        return {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": choices}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": []}

    return app


@pytest.fixture(scope="module")
def upstream():
    with running(reasoning_app()) as url:
        yield url


@pytest.fixture(scope="module")
def proxied(upstream):
    from pfm.serve import ServeConfig, create_app

    refiner = wrap(None, LinearFlow(), encoder=LetterEncoder(), n=4)
    with running(create_app(refiner, ServeConfig(upstream=upstream))) as url:
        yield url


@pytest.mark.parametrize("plan", ["inline", "field", "reasoning", "parts"])
def test_a_generator_hands_on_what_came_and_says_what_it_set_aside(plan, upstream):
    generator = OpenAIGenerator(plan, base_url=upstream)
    result = wrap(generator, LinearFlow(), encoder=LetterEncoder(), n=4)("p")
    assert result.text == ("<think>aaaa</think>xaaa" if plan == "inline" else "xaaa")
    assert result.reasoning == [19 if plan == "inline" else 4] * 4
    assert result.probabilities == refine_one(["x", "xaaa", "xa", "xb"]).probabilities


def test_an_answer_of_reasoning_alone_is_named(upstream):
    (draw,) = OpenAIGenerator("empty", base_url=upstream).draws(["p"], 1)
    assert "after 4 characters of hidden reasoning: let the model write more tokens" in str(draw.error)


@pytest.mark.parametrize("plan", ["inline", "field", "parts"])
def test_the_proxy_judges_answers_and_passes_on_what_came(plan, proxied):
    body = {"model": plan, "messages": [{"role": "user", "content": "p"}]}
    answer = httpx2.post(f"{proxied}/chat/completions", json=body).json()
    assert answer["pfm"]["changed"]
    assert answer["pfm"]["index"] == 1
    assert answer["pfm"]["reasoning"] == [19 if plan == "inline" else 4] * 4
    assert answer["choices"][0]["message"] == {"role": "assistant", **PLANS[plan]("xaaa")}


def test_the_proxy_streams_a_content_of_parts(proxied):
    with openai.OpenAI(base_url=proxied, api_key="none") as client:
        messages: Any = [
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": PLANS["parts"]("x")["content"]},
            {"role": "user", "content": "q"},
        ]
        chunks = list(client.chat.completions.create(model="parts", messages=messages, stream=True))
    contents = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert PLANS["parts"]("xaaa")["content"] in contents


def test_the_proxy_passes_over_cut_answers_and_on_where_all_are(proxied):
    body = {"messages": [{"role": "user", "content": "p"}]}
    answer = httpx2.post(f"{proxied}/chat/completions", json={"model": "cut", **body}).json()
    assert answer["choices"][0]["message"]["content"] == "xaaa"
    assert answer["pfm"]["probabilities"][0] == 0
    answer = httpx2.post(f"{proxied}/chat/completions", json={"model": "all-cut", **body}).json()
    assert answer["choices"][0]["message"]["content"] == "<think>aaaa"
    assert not answer["pfm"]["refined"]
    assert "EmptyAnswerError" in answer["pfm"]["reason"]


# --- a model in this process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [False, True])
def test_markers_that_are_special_tokens_or_of_the_template_are_kept(opened):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from pfm.generators import TransformersGenerator

    words = ["<end>", "[THINK]", "[/THINK]", "<user>", "plan", "Four.", "ask", "<bos>"]
    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<end>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<end>", pad_token="<end>",
        additional_special_tokens=["[THINK]", "[/THINK]", "<bos>"],
    )  # fmt: skip
    config = GPT2Config(vocab_size=len(words), n_positions=32, n_embd=8, n_layer=1, n_head=1, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    # The next token is decided by the one before: the embedding is the identity, the head a permutation.
    following = {3: 1, 6: 1, 1: 4, 4: 2, 2: 5, 5: 0, 7: 1}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(len(words), 8))
        model.transformer.wte.weight[:, :] = torch.eye(8)
        for token, after in following.items():
            model.lm_head.weight[after, token] += 10.0
    template = "{% for message in messages %}{{ '<user> ' + message['content'] }}{% endfor %}"
    template += "{{ ' [THINK]' }}" if opened else ""
    generator = TransformersGenerator(model, tokenizer, device="cpu", chat_template=template, temperature=0)
    (draw,) = generator.draws(["ask"], 1)
    assert draw.error is None
    assert draw.texts[0].startswith("[THINK]")
    assert answer_of(draw.texts[0]) == "Four."
    generator.parameters["max_new_tokens"] = 1  # cut off
    (cut,) = generator.draws(["ask"], 1)
    assert answer_of(cut.texts[0]) == "", cut.texts


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    rows = [
        {"prompt": f"q {number}", "chosen": f"A calm answer, number {number}.", "rejected": f"no idea {number} lol!!"}
        for number in range(40)
    ]
    pairs = pfm.PreferencePairs.from_rows(rows).encode(pfm.encoders.SurfaceEncoder(), progress=False)
    config = pfm.FlowConfig(residual=False, epochs=20)
    pfm.PreferenceFlow.fit(pairs, config, progress=False).save_pretrained(folder)
    return folder


def test_the_command_line_sets_reasoning_aside_unless_told_to_keep_it(fitted, tmp_path):
    noisy = "<think>lol!! no idea lol!! </think>A calm answer, number 3."
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q 1", "candidates": ["no idea 4 lol!!", noisy]}])
    ending = ["--flow", fitted, "--no-progress"]
    run("refine", rows, "--out", tmp_path / "out.jsonl", *ending)
    (result,) = read_rows(tmp_path / "out.jsonl")
    assert result["reasoning"] == [0, len(noisy) - len("A calm answer, number 3.")]
    run("refine", rows, "--out", tmp_path / "kept.jsonl", "--reasoning", "keep", *ending)
    (kept,) = read_rows(tmp_path / "kept.jsonl")
    assert "reasoning" not in kept
    flow, encoder = pfm.PreferenceFlow.from_pretrained(fitted), pfm.encoders.SurfaceEncoder()
    prompts = encoder.encode_prompts(["q 1"])
    for judged, text in ((result, "A calm answer, number 3."), (kept, noisy)):
        b = float(flow.win_probability(encoder.encode([text]), prompts))
        assert judged["probabilities"][1] == pytest.approx(b, abs=2e-6)
    assert kept["probabilities"][1] != result["probabilities"][1]
    run("label", rows, "--judge", "pattern:lol", "--out", tmp_path / "labels.jsonl", "--no-progress")
    (label,) = read_rows(tmp_path / "labels.jsonl")
    assert label["chosen"] == "no idea 4 lol!!"
    run("label", rows, "--judge", "pattern:lol", "--out", tmp_path / "k.jsonl", "--reasoning", "keep", "--no-progress")
    (label,) = read_rows(tmp_path / "k.jsonl")
    assert label["chosen"] == noisy


def test_training_rows_are_encoded_by_their_answers():
    class Listening:
        dimension = 1

        def __init__(self):
            self.texts = []

        def encode(self, texts, *, progress=False):
            self.texts += texts
            return torch.tensor([[float(len(text))] for text in texts])

    rows = [{"prompt": "q", "chosen": "<think>much to consider</think>Yes.", "rejected": "<think>cut off"}]
    pairs = PreferencePairs.from_rows(rows)
    seen = Listening()
    pairs.encode(seen, context=False, progress=False)
    assert seen.texts == ["Yes.", "<think>cut off"]
    whole = Listening()
    pairs.encode(whole, context=False, reasoning="keep", progress=False)
    assert whole.texts == [rows[0]["chosen"], rows[0]["rejected"]]
    with pytest.raises(ValueError, match="reasoning must be 'strip'"):
        pairs.encode(whole, reasoning="drop")
