"""What ``pfm fit`` says: of a flow that it will replace, of doubtful data, and of the flow that it has fitted."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.text import Text

from pfm.cli.session import Session

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs
    from pfm.data.pairs import PreferencePairs
    from pfm.encoders import Encoder
    from pfm.flow.preference_flow import PreferenceFlow
    from pfm.statistics import Estimate

__all__ = ["Origin", "preference_line", "replacement_note", "show_fit"]

_LOOKED_AT = 600  # outputs, for the line on what the flow prefers
_RESAMPLES = 200
_SPOKEN = 4  # traits of that line


@dataclass(frozen=True)
class Origin:
    """Checksums of what a flow was fitted on and how, kept in its metadata; no text can be read from them."""

    data: str
    settings: str

    @classmethod
    def of(cls, pairs: PreferencePairs, settings: Sequence[Any]) -> Origin:
        """Take the checksums of the pairs, in their order, and of JSON values."""
        rows = hashlib.sha256()
        for row in pairs:
            values = [row.get(name) for name in ("prompt", "chosen", "rejected", "weight", "probability", "group")]
            rows.update(json.dumps(values, default=str).encode() + b"\n")
        text = json.dumps(settings, sort_keys=True, default=str)
        return cls(rows.hexdigest()[:16], hashlib.sha256(text.encode()).hexdigest()[:16])

    def to_dict(self) -> dict[str, str]:
        """Return the checksums as JSON values."""
        return {"data": self.data, "settings": self.settings}


def replacement_note(out: Path, origin: Origin) -> str | None:
    """Say which flow the folder holds that this run replaces; None if there is none, or it is of the same fit."""
    config = out / "config.json"
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
        metadata, when = described["metadata"], datetime.fromtimestamp(config.stat().st_mtime)
        known = dict(metadata.get("fitted_from") or {})
        pairs = metadata.get("pairs")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"--out {out} holds a config.json that is none of a flow; this run replaces it at its end"
    if known == origin.to_dict():
        return None
    differs = "on unknown data"
    if known:
        differs = "with other settings" if known.get("data") == origin.data else "on other data"
    count = f"{pairs:,} pairs, " if isinstance(pairs, int) else ""
    return (
        f"--out {out} holds a flow fitted {differs} ({count}{when:%Y-%m-%d %H:%M}), which this run replaces at its "
        "end; to keep it, give another --out"
    )


def preference_line(flow: PreferenceFlow, pairs: PreferencePairs, encoder: Encoder, seed: int) -> tuple[str, list[str]]:
    """Say in one line what a flow prefers, with the warnings of :func:`pfm.explain.explain` on length.

    It looks at some of the pairs only. Empty where nothing is confirmed.
    """
    from pfm.explain.explanation import explain

    found = explain(
        flow, pairs, encoder,
        directions=0, contrasts=0, terms=0, max_outputs=_LOOKED_AT, resamples=_RESAMPLES, seed=seed, progress=False,
    )  # fmt: skip
    if not found.confirmed:
        return "", []
    spoken = found.spoken()
    line = ", ".join(spoken[:_SPOKEN]) or "no trait of the surface stands out; pfm explain shows texts"
    return f"Prefers: {line}.", [text for text in found.warnings if text.startswith("Length explains")]


def show_fit(
    session: Session,
    flow: PreferenceFlow,
    held: EncodedPairs | None,
    prefers: str,
    out: Path,
    pairs: Path,
) -> Estimate | None:
    """Print what was found, in plain sentences first; return the accuracy on prompts held out, if there are any."""
    from pfm.flow.card import findings
    from pfm.statistics import warn_of_few

    sentences = findings(flow)
    right = None if held is None else _held_out_accuracy(flow, held)
    if held is not None and right is not None:
        decided = int(held.decided.sum())
        sentences.insert(
            1,
            f"Prompts held out: {right.text(percent=True)} of {_counted(decided, 'pair')} ordered rightly by the "
            f"finished flow, which saw none of these {_counted(len(held.group.unique()), 'prompt')} (95% interval over "
            "prompts).",
        )
    if prefers:
        sentences.append(prefers)
    count, prompts = flow.metadata["pairs"], flow.metadata["prompts"]
    title = f"Fitted on {_counted(count, 'pair')} of {_counted(prompts, 'prompt')}"
    session.out.print(Panel(Text("\n".join(sentences)), title=title, title_align="left"))
    if held is not None and right is not None:
        few = warn_of_few(len(held.group.unique()), "held-out prompt")
        if few is not None:
            session.note(few)
        if right.low <= 0.5:
            session.note(
                "on held-out prompts this flow is not distinguishable from chance: more pairs, or cleaner ones, help"
            )
    if flow.guard_margin == float("inf"):
        session.note("no gain in win probability was confirmed, so refining with this flow keeps every original")
    folder = shlex.quote(str(out))
    session.out.print(Text(f"Next: pfm explain {folder} {shlex.quote(str(pairs))}", "bold"), soft_wrap=True)
    session.out.print(Text(f"      pfm refine OUTPUTS --flow {folder} --out refined.jsonl", "bold"), soft_wrap=True)
    session.out.print(Text(f"Details: {flow.summary()}", "dim"), soft_wrap=True)
    session.out.print(Text(f"saved to {out}", "dim"), soft_wrap=True)
    return right


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _held_out_accuracy(flow: PreferenceFlow, held: EncodedPairs) -> Estimate:
    """Return the weighted share of pairs whose order by b agrees with the label; ties by label are left out."""
    import torch

    from pfm.statistics import Bootstrap

    rows = held.gather(torch.arange(len(held)))
    gap = flow.win_probability(held.chosen, rows.context) - flow.win_probability(held.rejected, rows.context)
    right = 0.5 + 0.5 * (2 * rows.probability - 1) * gap.sign()
    weight = rows.weight * held.decided
    names, member = held.group.unique(return_inverse=True)
    totals = [torch.zeros(len(names)).index_add_(0, member, part) for part in (right * weight, weight)]
    estimate = Bootstrap(len(names)).share(totals[0], totals[1])
    if estimate is None:
        raise ValueError("the held-out pairs have weight 0 in all: choose another --seed or --held-out")
    return estimate
