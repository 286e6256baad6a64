"""Instructions that code can check: sixteen kinds, each with a graded score in [0, 1].

The instruction stands in the prompt, and most kinds ask for one thing in some prompts and for its opposite or another
amount in others, so that no answer is good whatever was asked. In the manner of IFEval (Zhou et al. 2023, arXiv
2311.07911), with grades in place of pass or fail: a small model fails nearly every strict check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["KINDS", "Instruction", "instructions", "score"]

Params = dict[str, Any]

TOPICS = (
    "the sea", "old bicycles", "bread", "winter mornings", "a lost umbrella", "trains", "coffee", "city parks",
    "learning to swim", "thunderstorms", "letters from friends", "honey bees", "mountain paths", "a new job",
    "street music", "cooking rice", "gardens", "museums", "the night sky", "running", "old photographs", "markets",
    "chess", "rivers", "a noisy neighbour", "birthdays", "school", "libraries", "cats", "public transport", "paper",
    "summer holidays", "tea", "a broken window", "farming", "bridges", "clocks", "the moon", "shoes", "local news",
)  # fmt: skip
NOUNS = ("river", "lamp", "butter", "stone", "window", "copper", "garden", "ticket", "music", "shadow", "apple", "road")
COMMON = ("the", "a", "is", "of", "and", "it", "to", "in")
OPENERS = ("Today", "Honestly", "Imagine", "However", "Listen", "Sometimes", "Perhaps", "Finally")
CLOSERS = ("forever", "again", "home", "together", "tomorrow", "enough", "silence", "light")
KEYS = ("name", "place", "reason", "colour", "price", "year", "size", "mood")
FUNCTION_WORDS = {
    "English": "the and of to in is that it for with as are this you on be was by an from",
    "Spanish": "el la los las de que y en un una es por con para se su al del como más",
    "French": "le la les des et est un une que dans pour qui du en sur avec ce il au pas",
    "German": "der die das und ist in zu den von mit ein eine auf für nicht sich im es dem auch",
    "Italian": "il la di che e un una per in è con del della si gli le non i nel sono",
}


@dataclass(frozen=True)
class Instruction:
    """Holds a prompt and what its answer is checked for.

    Attributes:
        name: such as "case-3". kind: a name of ``KINDS``. prompt: what the model reads. params: of the check.
    """

    name: str
    kind: str
    prompt: str
    params: Params


@dataclass(frozen=True)
class Kind:
    """Makes an instruction's sentence with its parameters, and checks an answer."""

    make: Callable[[np.random.Generator], tuple[str, Params]]
    check: Callable[[str, Params], float]


def instructions(instances: int, seed: int = 0) -> list[Instruction]:
    """Make so many distinct prompts of every kind.

    Raises:
        ValueError: fewer than one, or more than there are topics.
    """
    if not 1 <= instances <= len(TOPICS):
        raise ValueError(f"instances must be from 1 to {len(TOPICS)}, one a topic: got {instances}")
    found: list[Instruction] = []
    for number, (name, kind) in enumerate(KINDS.items()):
        rng = np.random.default_rng([seed, number])
        for instance, topic in enumerate(rng.permutation(TOPICS)[:instances].tolist()):
            sentence, params = kind.make(rng)
            found.append(Instruction(f"{name}-{instance}", name, f"Write about {topic}. {sentence}", params))
    return found


def score(kind: str, params: Params, text: str) -> float:
    """Return how well an answer follows an instruction, in [0, 1]; an answer without a letter or digit has 0.

    Raises:
        ValueError: there is no such kind.

    >>> score("length", {"most": 4}, "Bread is good with butter and salt.")
    0.571...
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}: got {kind!r}")
    return float(KINDS[kind].check(text.strip(), params)) if _words(text) else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])[\"'”’)]*\s+|\n+", text) if _words(part)]


def _near(count: int, wanted: int) -> float:
    """Grade a count: 1 if it is the wanted one, 0 if there is none of it."""
    return 1 / (1 + abs(count - wanted)) if count else 0.0


def _pick(rng: np.random.Generator, values: tuple[Any, ...]) -> Any:
    return values[int(rng.integers(len(values)))]


def _some(rng: np.random.Generator, values: tuple[str, ...], count: int) -> list[str]:
    return [values[place] for place in rng.permutation(len(values))[:count].tolist()]


def _length(rng: np.random.Generator) -> tuple[str, Params]:
    if rng.random() < 0.5:
        most = _pick(rng, (6, 8, 10, 12))
        return f"Use at most {most} words.", {"most": most}
    least = _pick(rng, (24, 26, 28, 30))
    return f"Use at least {least} words.", {"least": least}


def _check_length(text: str, params: Params) -> float:
    count = len(_words(text))
    return min(1.0, params["most"] / count if "most" in params else count / params["least"])


def _sentence_count(rng: np.random.Generator) -> tuple[str, Params]:
    count = _pick(rng, (1, 2, 3, 4))
    return f"Write exactly {count} sentence{'s' * (count > 1)}.", {"count": count}


def _include(rng: np.random.Generator) -> tuple[str, Params]:
    words = _some(rng, NOUNS, 3)
    return f'Use the words "{words[0]}", "{words[1]}" and "{words[2]}".', {"words": words}


def _check_include(text: str, params: Params) -> float:
    found = set(_words(text))
    return sum(bool({word, f"{word}s"} & found) for word in params["words"]) / len(params["words"])


def _avoid(rng: np.random.Generator) -> tuple[str, Params]:
    words = _some(rng, COMMON, 2)
    return f'Do not use the word "{words[0]}" or the word "{words[1]}".', {"words": words}


def _check_avoid(text: str, params: Params) -> float:
    return 1 / (1 + sum(word in params["words"] for word in _words(text)))


def _list(rng: np.random.Generator) -> tuple[str, Params]:
    count, marker = _pick(rng, (2, 3, 4)), _pick(rng, ("number", "dash"))
    told = "numbered items" if marker == "number" else 'items that begin with "-"'
    return f"Answer with a list of {count} short {told}, one a line.", {"count": count, "marker": marker}


def _check_list(text: str, params: Params) -> float:
    lines = [line.strip() for line in text.splitlines()]
    patterns = {"number": r"\d+[.)]\s*\S", "dash": r"[-–]\s*\S"}
    found = {name: sum(bool(re.match(pattern, line)) for line in lines) for name, pattern in patterns.items()}
    other = sum(bool(re.match(r"[*•]\s*\S", line)) for line in lines)
    wrong = max(other, *(count for name, count in found.items() if name != params["marker"]))
    return max(_near(found[params["marker"]], params["count"]), _near(wrong, params["count"]) / 2)


def _json(rng: np.random.Generator) -> tuple[str, Params]:
    keys = _some(rng, KEYS, 2)
    return f'Answer only with a JSON object that has the keys "{keys[0]}" and "{keys[1]}".', {"keys": keys}


def _check_json(text: str, params: Params) -> float:
    braces = "{" in text
    named = sum(f'"{key}"' in text for key in params["keys"]) / len(params["keys"])
    bare = re.sub(r"^```(?:json)?\s*|\s*```$", "", text)
    try:
        whole = isinstance(json.loads(bare), dict)
    except (ValueError, RecursionError):
        whole = False
    return 0.25 * braces + 0.5 * named + 0.25 * whole


def _language(rng: np.random.Generator) -> tuple[str, Params]:
    language = _pick(rng, ("Spanish", "French", "German", "Italian"))
    return f"Write it in {language}.", {"language": language}


def _check_language(text: str, params: Params) -> float:
    """Grade by function words: those of the language against those of any other that are not its own too."""
    sets = {name: set(told.split()) for name, told in FUNCTION_WORDS.items()}
    own, words = sets.pop(params["language"]), _words(text)
    wanted = sum(word in own for word in words)
    other = max(sum(word in known - own for word in words) for known in sets.values())
    return wanted / (wanted + other) if wanted else 0.0


def _case(rng: np.random.Generator) -> tuple[str, Params]:
    upper = bool(rng.random() < 0.5)
    return "Write everything in " + ("CAPITAL LETTERS." if upper else "lowercase letters."), {"upper": upper}


def _check_case(text: str, params: Params) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    upper = sum(letter.isupper() for letter in letters) / max(len(letters), 1)
    return upper if params["upper"] else max(0.0, 1 - 10 * upper)  # one letter in ten is a capital: lowercase failed


def _first(rng: np.random.Generator) -> tuple[str, Params]:
    word = _pick(rng, OPENERS)
    return f'Begin with the word "{word}".', {"word": word}


def _check_first(text: str, params: Params) -> float:
    words, wanted = _words(text), params["word"].lower()
    return 1.0 if words[0] == wanted else 0.5 if wanted in words[:6] else 0.25 * (wanted in words)


def _last(rng: np.random.Generator) -> tuple[str, Params]:
    word = _pick(rng, CLOSERS)
    return f'Write one short sentence and end it with the word "{word}".', {"word": word}


def _check_last(text: str, params: Params) -> float:
    words, wanted = _words(text), params["word"]
    ends = {_words(sentence)[-1] for sentence in _sentences(text)}
    return 1.0 if words[-1] == wanted else 0.75 if wanted in ends else 0.25 * (wanted in words)


def _questions(rng: np.random.Generator) -> tuple[str, Params]:
    count = _pick(rng, (1, 2, 3))
    return f"Ask the reader exactly {count} question{'s' * (count > 1)}.", {"count": count}


def _commas(rng: np.random.Generator) -> tuple[str, Params]:
    if rng.random() < 0.5:
        return "Use no commas.", {"least": 0}
    least = _pick(rng, (3, 4, 5))
    return f"Use at least {least} commas.", {"least": least}


def _check_commas(text: str, params: Params) -> float:
    count = text.count(",")
    return min(1.0, count / params["least"]) if params["least"] else 1 / (1 + count)


def _numbers(rng: np.random.Generator) -> tuple[str, Params]:
    least = _pick(rng, (2, 3, 4))
    return f"Use at least {least} numbers, in digits.", {"least": least}


def _check_numbers(text: str, params: Params) -> float:
    return min(1.0, len(re.findall(r"\d+(?:[.,]\d+)*", text)) / params["least"])


def _enclosed(rng: np.random.Generator) -> tuple[str, Params]:
    name, marks = _pick(rng, (("double quotation marks", '""'), ("round brackets", "()"), ("square brackets", "[]")))
    return f"Put the whole answer in {name}.", {"marks": marks}


def _check_enclosed(text: str, params: Params) -> float:
    first, last = params["marks"]
    whole = 0.5 * text.startswith(first) + 0.25 * text.rstrip(".").endswith(last)
    return whole + 0.25 * (first in text)


def _initial(rng: np.random.Generator) -> tuple[str, Params]:
    letter = _pick(rng, tuple("SBTMPCW"))
    return f"Begin as many words as you can with the letter {letter}.", {"letter": letter.lower()}


def _check_initial(text: str, params: Params) -> float:
    words = _words(text)
    return min(1.0, 2 * sum(word.startswith(params["letter"]) for word in words) / max(len(words), 6))


def _person(rng: np.random.Generator) -> tuple[str, Params]:
    who = _pick(rng, ("I", "you", "we"))
    return f'Use the word "{who}" in every sentence.', {"who": who}


def _check_person(text: str, params: Params) -> float:
    sentences = _sentences(text)
    meant = params["who"].lower()
    return sum(any(re.split(r"['’]", word)[0] == meant for word in _words(one)) for one in sentences) / len(sentences)


KINDS: dict[str, Kind] = {
    "length": Kind(_length, _check_length),
    "sentences": Kind(_sentence_count, lambda text, params: _near(len(_sentences(text)), params["count"])),
    "include": Kind(_include, _check_include),
    "avoid": Kind(_avoid, _check_avoid),
    "list": Kind(_list, _check_list),
    "json": Kind(_json, _check_json),
    "language": Kind(_language, _check_language),
    "case": Kind(_case, _check_case),
    "first word": Kind(_first, _check_first),
    "last word": Kind(_last, _check_last),
    "questions": Kind(_questions, lambda text, params: _near(text.count("?"), params["count"])),
    "commas": Kind(_commas, _check_commas),
    "numbers": Kind(_numbers, _check_numbers),
    "enclosed": Kind(_enclosed, _check_enclosed),
    "initial": Kind(_initial, _check_initial),
    "person": Kind(_person, _check_person),
}
