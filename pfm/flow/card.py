"""What a fit found, in plain sentences, and the model card that a saved flow carries."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from pfm.flow.model import FlowModel

__all__ = ["findings", "is_own_card", "model_card"]

_OWN = "<!-- Written by preference-flow with each save, as long as this line stands. -->"
_DEFAULT = "This model has been pushed to the Hub using the [PytorchModelHubMixin]"  # of earlier versions
_USE = """```python
import pfm

flow = pfm.PreferenceFlow.from_pretrained("FOLDER")
encoder = pfm.encoders.encoder_from_description(flow.metadata["encoder"])
refiner = pfm.wrap(my_generator, flow, encoder=encoder, n=8)
```"""


def findings(flow: FlowModel) -> list[str]:
    """Say in plain sentences whether a flow tells better from worse, and whether its guard lets anything through."""
    metadata, margin = flow.metadata, flow.guard_margin
    win = metadata.get("win") or {}
    accuracy, prompts, confirmed = win.get("accuracy"), metadata.get("prompts"), margin != math.inf
    said = []
    if accuracy is not None:
        kind = "prompts" if prompts is None or prompts > 1 else "pairs of its one prompt"
        verdict = "Tells better from worse" if confirmed else "Not shown to tell better from worse"
        said.append(
            f"{verdict}: on {kind} left out of the fit (cross-validation) it orders {accuracy:.1%} of the pairs "
            "rightly; chance is 50%."
        )
    if not confirmed:
        said.append("Changes nothing: held-out pairs confirm no gain, so every original is kept.")
    elif margin < 0.0005:
        said.append("Changes an output for any gain in win probability.")
    else:
        said.append(f"Changes an output for a gain in win probability of {margin:.3f} or more.")
    return said


def is_own_card(path: Path) -> bool:
    """Return whether a file is a card that no person has taken over, or no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    return _OWN in text or _DEFAULT in text


def model_card(flow: FlowModel, **values: Any) -> ModelCard:
    """Make the card of a flow; ``values`` go into its metadata for the hub, such as ``license``."""
    from huggingface_hub import ModelCard, ModelCardData

    tags = ["preference-flow", "preference-learning", *(values.pop("tags", None) or ())]
    known: dict[str, Any] = {"library_name": "preference-flow", "tags": list(dict.fromkeys(tags))} | values
    metadata = flow.metadata
    pairs, prompts = metadata.get("pairs"), metadata.get("prompts")
    of = f" on {_counted(pairs, 'pair')} of {_counted(prompts, 'prompt')}" if pairs and prompts else ""
    encoder = _encoder(metadata.get("encoder"))
    size = "×".join(map(str, flow.event_shape))
    source = f", by the encoder `{encoder}`" if encoder else ""
    facts = [f"Outputs are vectors of {size} numbers{source}.", *findings(flow)]
    lines = [
        _OWN,
        "# Preference flow",
        f"A vector field and a win probability b, fitted{of}. They choose among the outputs of a generator, or move "
        "them, towards the preferred ones.",
        "\n".join(f"- {fact}" for fact in facts),
        "`pfm explain FOLDER pairs.jsonl` shows what it prefers, and whether that is length alone; `pfm evaluate` "
        "measures it on scored outputs of your own.",
        _USE,
    ]
    if "license" not in known:
        lines.append("No licence is stated. The preferences may be subject to that of their source.")
    return ModelCard(f"---\n{ModelCardData(**known).to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _encoder(described: Any) -> str:
    """Return the name of the encoder without what a path or an address would tell of its owner."""
    name = str((described or {}).get("name") or "") if isinstance(described, dict) else ""
    parts = [
        re.split(r"[/\\]", part)[-1] if part.startswith(("/", "~", ".")) or "\\" in part else part
        for part in re.split(r"\s*\+\s*", name)
    ]
    return re.sub(r"[`\s\x00-\x1f]", " ", " + ".join(parts)).strip()
