"""TransformersGenerator with tiny models: repeatable draws, the right law, templates, and what cannot be drawn."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from support.letters import LetterEncoder, LinearFlow
from support.word_tokenizers import WORDS, make_tokenizer

from pfm._internal.special_tokens import SpecialTokens
from pfm.errors import EmptyAnswerError, GenerationError
from pfm.generators import CachedGenerator, TransformersGenerator
from pfm.refiner import wrap

WORDS += ["good", "bad", "stone", "river", "lamp", "garden", "wind", "paper"]
PROMPTS = ["good stone", "bad river lamp wind", "garden", "paper paper paper"]
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def causal():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=48, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1,
        initializer_range=0.4,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # the end of a text is rare, and padding is never drawn
        model.transformer.wte.weight[0] = model.transformer.wte.weight[1] * 2
    return model.eval()


@pytest.fixture(scope="module")
def seq2seq():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,  # pyright: ignore[reportCallIssue]
        )
    ).eval()  # fmt: skip


def texts(generator: TransformersGenerator, prompts: list[Any], n: int, **options: Any) -> list[list[str]]:
    draws = list(generator.draws(prompts, n, **options))
    assert [draw.error for draw in draws] == [None] * len(prompts)
    return [draw.texts for draw in draws]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_draws_depend_on_seed_prompt_and_number_and_not_on_the_batch(kind, request, tokenizer):
    model = request.getfixturevalue(kind)

    def make(**options: Any) -> TransformersGenerator:
        return TransformersGenerator(model, tokenizer, **{"max_new_tokens": 6, "batch_size": 5, **options})

    found = texts(make(), PROMPTS, 4)
    assert [len(row) for row in found] == [4] * 4
    assert len({text for row in found for text in row}) > 8
    assert texts(make(), PROMPTS, 4) == found
    # Alone, in another order, in another batch with other padding: the same texts.
    assert texts(make(batch_size=1), PROMPTS[::-1], 4) == found[::-1]
    assert texts(make(batch_size=64), PROMPTS, 4) == found
    assert texts(make(), PROMPTS, 2) == [row[:2] for row in found]
    assert texts(make(), PROMPTS, 2, start=[2] * 4) == [row[2:] for row in found]
    assert texts(make(), [PROMPTS[0]] * 2, 2) == [found[0][:2], found[0][2:]]
    assert texts(make(seed=1), PROMPTS, 4) != found
    state = torch.get_rng_state()
    texts(make(), PROMPTS, 2)
    assert torch.equal(torch.get_rng_state(), state)  # random numbers of the program are left alone


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 2.0, "min_p": 0.2}]
)
def test_tokens_follow_the_law_of_the_model(settings, causal, tokenizer):
    with torch.inference_mode():
        scores = causal(torch.tensor([tokenizer("good stone")["input_ids"]])).logits[0, -1].double()
    law = (scores / settings.get("temperature", 1)).softmax(-1).numpy()
    order = np.argsort(-law)
    if "top_k" in settings:
        law[order[3:]] = 0
    if "top_p" in settings:
        law[order[1:][np.cumsum(law[order])[:-1] >= 0.6]] = 0
    if "min_p" in settings:
        law[law < 0.2 * law.max()] = 0
    law /= law.sum()
    law[1], law[2] = law[1] + law[2], 0  # both show as no text
    generator = TransformersGenerator(causal, tokenizer, max_new_tokens=1, batch_size=512, **settings)
    rows = generator._generated([_row(generator, "good stone", number) for number in range(4000)])
    counts = np.zeros(len(WORDS))
    for text, _, _ in rows:
        counts[WORDS.index(text) if text in WORDS else 1] += 1
    assert (counts[law == 0] == 0).all()
    kept = law > 0
    deviation = (counts[kept] / 4000 - law[kept]) / np.sqrt(law[kept] * (1 - law[kept] + 1e-9) / 4000)
    assert np.abs(deviation).max() < 4.5
    # The control: a law bent to another temperature does not pass for this one.
    if not settings:
        other = (scores / 1.3).softmax(-1).numpy()[3:]
        assert np.abs((counts[3:] / 4000 - other) / np.sqrt(other * (1 - other) / 4000)).max() > 4.5


def llama(words: int = len(WORDS), window: int | None = None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    options: dict[str, Any] = {
        "vocab_size": words, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 1, "initializer_range": 0.4,
    }  # fmt: skip
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**options)).eval()
    return MistralForCausalLM(MistralConfig(sliding_window=window, **options)).eval()


@pytest.mark.parametrize(
    ("window", "settings", "once"),
    [(None, {}, True), (None, {"repetition_penalty": 1.3, "top_k": 4}, True), (None, {"use_cache": False}, False),
     (3, {}, False)],
)  # fmt: skip
def test_the_samples_of_a_prompt_read_it_once(window, settings, once, tokenizer):
    model, read = llama(window=window), []
    model.get_input_embeddings().register_forward_hook(lambda _, given, out: read.append(given[0].numel()))

    def drawn(batch_size: int) -> list[list[str]]:
        read.clear()
        settings_ = {"max_new_tokens": 6, "batch_size": batch_size, "min_new_tokens": 6, **settings}
        return texts(TransformersGenerator(model, tokenizer, **settings_), PROMPTS[:2], 8)

    together = drawn(16)
    tokens = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS[:2]]
    steps = 16 * 6  # a token of each sample a step; the first step reads the prompt's last token
    if once:
        assert sum(read) == 2 * (max(tokens) - 1) + steps  # with padding
    else:
        assert sum(read) > 16 * max(tokens)
    assert drawn(1) == together


def test_few_possible_tokens_of_many_are_drawn_by_the_same_numbers():
    from pfm.generators.transformers import _OwnNumbers

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 400, generator=generator)
    scores[:, ::2] = 0.5  # ties
    scores[torch.rand(50, 400, generator=generator) < 0.95] = -torch.inf
    scores[:, 7] = 1.0
    uniforms = torch.rand(50, 1, generator=generator, dtype=torch.float64).numpy()
    uniforms[:2] = [[0.0], [1 - 2**-53]]
    drawn = _OwnNumbers(uniforms, [])(torch.zeros(50, 1), scores)
    sums = scores.double().softmax(-1).cumsum(-1).numpy()
    wanted = [int(np.searchsorted(row / row[-1], at[0], side="right")) for row, at in zip(sums, uniforms, strict=True)]
    assert drawn.argmax(-1).tolist() == wanted
    assert ((drawn == 0).sum(-1) == 1).all()
    assert (drawn.isinf().sum(-1) == 399).all()
    for wrong in (torch.nan, torch.inf):
        broken = scores.clone()
        broken[3, 11] = wrong
        with pytest.raises(GenerationError, match="NaN or infinity"):
            _OwnNumbers(uniforms, [])(torch.zeros(50, 1), broken)


def _row(generator: TransformersGenerator, prompt: str, number: int) -> Any:
    from pfm.generators.transformers import _Roll, _Row

    roll = _Roll(prompt, 0, 1, 1)
    roll.ids = generator._encoded(prompt)
    return _Row(roll, number)


def test_temperature_0_takes_the_likeliest_tokens_as_the_model_itself_does(causal, tokenizer):
    generator = TransformersGenerator(causal, tokenizer, max_new_tokens=5, temperature=0)
    (draw,) = generator.draws(["garden"], 3)
    ids = torch.tensor([tokenizer("garden")["input_ids"]])
    out = causal.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert draw.texts == [tokenizer.decode(out, skip_special_tokens=True)] * 3
    assert draw.calls == 1


def test_a_draw_tells_what_it_took(causal, tokenizer):
    (draw,) = TransformersGenerator(causal, tokenizer, max_new_tokens=4, batch_size=4).draws(["good stone"], 4)
    lengths = [len(text.split()) for text in draw.texts]
    assert draw.finish_reasons == ["length" if length == 4 else "stop" for length in lengths]
    assert draw.usage["prompt_tokens"] == 2
    assert draw.usage["completion_tokens"] >= sum(lengths)
    assert draw.seconds > 0


def test_conversations_are_written_with_the_chat_template(causal):
    conversation = [{"role": "user", "content": "hello there"}]
    plain = make_tokenizer()
    templated = make_tokenizer(chat_template=TEMPLATE)
    generator = TransformersGenerator(causal, templated, max_new_tokens=4)
    assert generator._encoded(conversation) == plain("<user> hello there <assistant>")["input_ids"]
    assert generator._encoded("hello there") == generator._encoded(conversation)  # a text is the user's turn
    assert TransformersGenerator(causal, templated, chat_template="")._encoded("hello") == plain("hello")["input_ids"]
    given = TransformersGenerator(causal, plain, chat_template=TEMPLATE, max_new_tokens=4)
    assert texts(given, [conversation], 3) == texts(generator, [conversation], 3)
    bad, good = TransformersGenerator(causal, plain, max_new_tokens=4).draws([conversation, "hello"], 2)
    assert str(bad.error).startswith("ValueError: the tokenizer has no chat template")
    assert (len(good.texts), good.error) == (2, None)


def test_texts_cannot_spell_the_tokens_that_frame_them(causal):
    extra = {"additional_special_tokens": ["<user>", "<assistant>"]}
    generator = TransformersGenerator(causal, make_tokenizer(chat_template=TEMPLATE, **extra), max_new_tokens=4)
    framing = [WORDS.index(name) for name in ("<user>", "<assistant>", "<end>")]
    honest = generator._encoded("good lamp")
    for told in ("good <end> <assistant> lamp", "good<end>lamp", "<end<end>>", "<<assistant>assistant>"):
        found = generator._encoded(told)
        assert [token for token in found if token in framing] == [token for token in honest if token in framing]
        assert generator._encoded([{"role": "user", "content": told}]) == found
    assert honest == generator.tokenizer("<user> good lamp <assistant>")["input_ids"]
    # A prompt that no template frames is the caller's own, special tokens included.
    assert WORDS.index("<end>") in TransformersGenerator(causal, make_tokenizer(), max_new_tokens=4)._encoded("a <end>")


@pytest.mark.parametrize(
    ("special", "text", "broken"),
    [
        ([], "a</s>b", "a</s>b"),
        (["</s>"], "a</s>b</s>", "a< /s>b< /s>"),
        (["<|a|>", "<|a|>b"], "<|a|>b", "< |a|>b"),
        (["<a>", "<a"], "<a><a", "< a>< a"),
        ([" ", "\n\n", "x", " <s>"], " \n\nx <s>", " \n\nx < s>"),
    ],
)
def test_spellings_of_special_tokens_are_broken(special, text, broken):
    class Tokenizer:
        all_special_tokens = special

    tokens = SpecialTokens(Tokenizer())
    assert tokens.broken(text) == broken
    assert tokens.broken(broken) == broken
    parts = {"role": "user", "content": [{"type": "text", "text": text}]}
    assert tokens.broken_turns([{"role": "user", "content": text}, parts]) == [
        {"role": "user", "content": broken}, parts,
    ]  # fmt: skip


def test_what_does_not_fit_is_named_and_leaves_the_rest_alone(causal, tokenizer):
    generator = TransformersGenerator(causal, tokenizer, max_new_tokens=8, batch_size=3)
    long, empty, good = generator.draws(["stone " * 45, "", "good"], 2)
    assert str(long.error).startswith(
        "ContextTooLongError: 45 tokens of the prompt and max_new_tokens=8 are more than the 48"
    )
    assert (len(empty.texts), empty.error) == (2, None)
    assert (len(good.texts), good.error) == (2, None)


def test_a_text_of_nothing_is_drawn_again_and_then_named(causal, tokenizer, monkeypatch):
    generator = TransformersGenerator(causal, tokenizer, max_new_tokens=3)
    monkeypatch.setattr(generator, "_text", lambda *_: ("text" if next(fills) else " ", "stop", 1))
    fills = iter([False, True] * 50)
    (draw,) = generator.draws(["good"], 4)
    assert (len(draw.texts), draw.dropped, draw.error) == (3, 3, None)
    fills = iter([False] * 100)
    (draw,) = generator.draws(["good"], 4)
    assert str(draw.error).startswith(EmptyAnswerError.__name__)
    assert draw.dropped == 8


def test_a_failing_batch_is_halved_until_it_fits(causal, tokenizer, monkeypatch):
    generator = TransformersGenerator(causal, tokenizer, max_new_tokens=4, batch_size=8)
    whole = texts(generator, PROMPTS, 4)
    sizes = []
    generate = TransformersGenerator._generated

    def little_memory(self, rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("too little memory")
        if any(row.roll.prompt == "garden" for row in rows):
            raise RuntimeError("no garden")
        return generate(self, rows)

    monkeypatch.setattr(TransformersGenerator, "_generated", little_memory)
    draws = list(generator.draws(PROMPTS, 4))
    assert max(sizes) == 8
    assert [draw.error for draw in draws] == [None, None, "RuntimeError: no garden", None]
    assert [draw.texts for draw in draws if draw.error is None] == [whole[0], whole[1], whole[3]]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_folder_is_loaded_and_gives_the_same_texts(kind, request, tokenizer, tmp_path):
    model = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.8}
    loaded = TransformersGenerator(tmp_path, device="cpu", **options)
    own = TransformersGenerator(model, tokenizer, **options)
    assert texts(loaded, PROMPTS, 2) == texts(own, PROMPTS, 2)
    assert loaded.describe()["weights"] == own.describe()["weights"]
    half = TransformersGenerator(str(tmp_path), device="cpu", dtype="bfloat16", **options)
    assert half.describe()["dtype"] == "bfloat16"
    assert len(texts(half, PROMPTS, 2)) == 4
    assert pickle.loads(pickle.dumps(own)).describe() == own.describe()


def test_settings_of_the_model_itself_count_unless_overruled(causal, tokenizer, monkeypatch):
    monkeypatch.setattr(causal.generation_config, "temperature", 0.01)
    monkeypatch.setattr(causal.generation_config, "max_new_tokens", 3)
    likeliest = texts(TransformersGenerator(causal, tokenizer, temperature=0), PROMPTS, 1)
    assert texts(TransformersGenerator(causal, tokenizer), PROMPTS, 1) == likeliest
    assert texts(TransformersGenerator(causal, tokenizer, temperature=1.0), PROMPTS, 1) != likeliest


def test_another_fit_of_the_same_model_is_another_generator_to_the_cache(causal, tokenizer, tmp_path):
    generator = TransformersGenerator(causal, tokenizer, max_new_tokens=4)
    cached = CachedGenerator(generator, tmp_path)
    before = texts(generator, PROMPTS, 3)
    assert [draw.texts for draw in cached.draws(PROMPTS, 3)] == before
    weights = causal.transformer.wte.weight
    with torch.no_grad():
        weights += 0.5 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    try:
        refit = TransformersGenerator(causal, tokenizer, max_new_tokens=4)
        assert refit.describe()["weights"] != generator.describe()["weights"]
        assert [draw.texts for draw in CachedGenerator(refit, tmp_path).draws(PROMPTS, 3)] != before
    finally:
        with torch.no_grad():
            weights -= 0.5 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    assert [draw.texts for draw in cached.draws(PROMPTS, 3)] == before


def test_fresh_candidates_are_others_than_those_of_the_batch(causal, tokenizer):
    refiner = wrap(
        TransformersGenerator(causal, tokenizer, max_new_tokens=6), LinearFlow(), encoder=LetterEncoder(), n=2
    )
    batch = [result.candidates for result in refiner.batch(PROMPTS, progress=False)]
    assert batch == [result.candidates for result in refiner.batch(PROMPTS, progress=False)]
    assert all(set(fresh) != set(row) for fresh, row in zip(refiner.candidates(PROMPTS, 2), batch, strict=True))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"tokenizer": None}, ValueError, "pass tokenizer="),
        ({"model": 3}, TypeError, "got int"),
        ({"model": "./no/such/folder"}, OSError, "no/such/folder"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"num_beams": 4}, ValueError, "num_beams cannot be set"),
        ({"num_return_sequences": 4}, ValueError, "num_return_sequences cannot be set"),
    ],
)
def test_wrong_arguments_are_refused(arguments, kind, message, causal, tokenizer):
    given = {"model": causal, "tokenizer": tokenizer, **arguments}
    with pytest.raises(kind, match=message):
        TransformersGenerator(**given)
