"""A causal language model trained in seconds on one-line film reviews, and served by `transformers serve`."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from support.places import data_path

ASK = "write a review"


def reviews() -> list[tuple[str, int]]:
    """Read (text, 1 for liked or 0) of rt_polarity, in a fixed random order; skip the test where there is no data."""
    path = data_path("rt_polarity", "rt_polarity.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    return [(row["text"], row["label"]) for row in rows]


def train(folder: Path, texts: list[str], *, steps: int = 150, words: int = 1200) -> Path:
    """Train a two-layer GPT-2 on short texts of frequent words, and save it with tokenizer and chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    counts: dict[str, int] = {}
    for word in f"{' '.join(texts)}".split():
        counts[word] = counts.get(word, 0) + 1
    common = ["<end>", "<unknown>", "<user>", "<assistant>", *ASK.split()]
    common += [word for word in sorted(counts, key=lambda word: -counts[word]) if word not in common][:words]
    vocabulary = {word: number for number, word in enumerate(common)}
    model_of_words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    model_of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model_of_words, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    prompt = tokenizer(f"<user> {ASK} <assistant>")["input_ids"]
    known = [text.split() for text in texts if len(text.split()) <= 16]
    rows = [[*prompt, *(vocabulary[word] for word in text), 0] for text in known if all(w in vocabulary for w in text)]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=64, n_embd=96, n_layer=2, n_head=2, eos_token_id=0, pad_token_id=0,
        bos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    source = random.Random(0)
    for _ in range(steps):
        batch = source.sample(rows, 16)
        width = max(map(len, batch))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        labels = torch.tensor(
            [[-100] * len(prompt) + row[len(prompt) :] + [-100] * (width - len(row)) for row in batch]
        )
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generation = model.generation_config
    generation.do_sample, generation.max_new_tokens, generation.top_k = True, 24, 50
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def transformers_serve(model: Path, folder: Path) -> Iterator[str]:
    """Serve a saved model by ``transformers serve`` on loopback, and give its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--device", "cpu"]
    process = subprocess.Popen(
        [str(part) for part in [*command, "--host", "127.0.0.1", "--port", port, "--default-seed", 0]],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "serve.log").open("w"),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder), "OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"transformers serve did not start: {(folder / 'serve.log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(10)
