"""A small world in which style is worth something: drafts with flaws, people who mind them, models that write.

A draft says one thing about a topic and has each of four flaws or not: shouting, a filler, no capital, no full stop.
People prefer fewer flaws, with Bradley–Terry noise. :class:`Writer` is a model that can take flaws out of a draft when
most of the examples that it is shown lack them.
"""

from __future__ import annotations

import math
import random
import re
from hashlib import sha256

from pfm.data import PreferencePairs

TOPICS = ["the harbour", "old maps", "slow trains", "rye bread", "night markets", "tide tables", "garden walls"]
FACTS = [
    "they are quiet before seven in the morning",
    "most visitors come in the late summer",
    "two brothers looked after them for years",
    "a short walk from the station leads there",
    "nobody remembers who built the first one",
    "the guide books leave this part out",
]
FLAWS = ("shout", "filler", "lower", "open")


def request(number: int) -> str:
    """Give a request; every number another one."""
    return f"Tell me about {TOPICS[number % len(TOPICS)]}, part {number}."


def sentence(topic: str, fact: str, flaws: set[str]) -> str:
    """Write a draft with some flaws."""
    text = f"{topic} and {fact}"
    text = text if "lower" in flaws else text.capitalize()
    if "filler" in flaws:
        text += " lol"
    return text + ("!!!" if "shout" in flaws else "" if "open" in flaws else ".")


def flaws_of(text: str) -> set[str]:
    """Find the flaws of a text."""
    found = set()
    if "!!!" in text:
        found.add("shout")
    if "lol" in text:
        found.add("filler")
    if text[:1].islower():
        found.add("lower")
    if not text.rstrip().endswith((".", "!")):
        found.add("open")
    return found


def quality(prompt: object, text: str) -> float:
    """Judge a text as people do, without looking at vectors: the fewer flaws the better."""
    return -float(len(flaws_of(text)))


def draft(source: random.Random) -> str:
    """Draw a draft: each flaw is more likely there than not."""
    flaws = {flaw for flaw in FLAWS if source.random() < 0.7}
    fact = source.choice(FACTS).replace(" the ", f" the {source.randint(2, 99)} ", 1)
    return sentence(source.choice(TOPICS), f"{fact}, says page {source.randint(100, 999)}", flaws)


def preferences(count: int = 600, seed: int = 0) -> PreferencePairs:
    """Draw labelled pairs of drafts, four a request."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        one, two = draft(source), draft(source)
        while one == two:
            two = draft(source)
        better = 1 / (1 + math.exp(-1.5 * (quality("", one) - quality("", two))))
        chosen, rejected = (one, two) if source.random() < better else (two, one)
        rows.append({"prompt": request(number // 4), "chosen": chosen, "rejected": rejected})
    return PreferencePairs.from_rows(rows)


def blocks(prompt: str) -> dict[str, str]:
    """Take the fenced blocks of a prompt apart, by label."""
    fenced = re.compile(r"^\[BEGIN ([^\]]*?) ([0-9a-f]{16})\]\n(.*?)\n\[END \1 \2\]$", re.M | re.S)
    return {found[1]: found[3] for found in fenced.finditer(prompt)}


class Writer:
    """Is a frozen model in three kinds: it answers requests with drafts, and revises drafts as it can.

    ``"able"`` takes each flaw that most examples lack out of the draft with probability 0.6. ``"clumsy"`` adds a flaw.
    ``"echo"`` gives the draft back, ``"copy"`` the first example. What it writes depends on seed, prompt and number of
    the call alone.
    """

    def __init__(self, kind: str = "able", seed: int = 0) -> None:
        self.kind = kind
        self.seed = seed
        self.calls = 0
        self.asked: list[str] = []

    def __call__(self, prompt: str) -> str:
        """Answer a request, or revise a draft."""
        self.calls += 1
        earlier = self.asked.count(prompt)
        self.asked.append(prompt)
        source = random.Random(sha256(f"{self.seed} {earlier} {prompt}".encode()).digest())
        parts = blocks(prompt)
        if "draft" not in parts:
            return draft(source)
        text = parts["draft"]
        if self.kind == "echo":
            return text
        examples = [part for label, part in parts.items() if label.startswith("example")]
        if self.kind == "copy":
            return examples[0]
        flaws = flaws_of(text)
        bare = text.rstrip("!.").removesuffix(" lol")
        topic, _, fact = bare.partition(" and ")
        if self.kind == "clumsy":
            flaws |= {source.choice(["filler", "lower"])}
            return sentence(topic.lower(), fact, flaws)
        seldom = {flaw for flaw in flaws if 2 * sum(flaw in flaws_of(example) for example in examples) < len(examples)}
        flaws -= {flaw for flaw in sorted(seldom) if source.random() < 0.6}
        return sentence(topic.lower(), fact, flaws)
