"""What does a flow prefer? The directions along which it moves outputs, named so that a person can judge them.

All comparisons are within prompts: an answer against the other answers to its own prompt. A trait
(length, lists, hedging, ...) is quantified three ways, in standard deviations between the answers to one prompt:

- *moved*: what the flow's displacement T(y) - y makes of it. A ridge regression of the trait on the embedding, fitted
  on the other folds of prompts, is applied to the displacement. The part of a trait that the embedding does not
  predict is missing, so the estimate errs towards zero; ``told`` is the share that it predicts.
  Its interval holds the regression's own error.
- *picked*: what choosing among real outputs with probability proportional to b makes of it, Cov(b, f) / E[b].
  With p1 = 2 pi_ref b that is the aim of one pass, without any regression.
- *labelled*: half the difference between chosen and rejected outputs in the given pairs, the same quantity from the
  labels alone. It is the one whose interval knows how noisy the labels are.

What the flow's own held-out prompts did not confirm is reported as no direction at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfm._internal.checks import check_seed, check_whole
from pfm._internal.significance import CONFIRMED
from pfm.devices import standard_defaults
from pfm.explain.changes import accuracy_of, correlations, moved_traits, pair_labels, trait_changes, varying_traits
from pfm.explain.directions import find_directions
from pfm.explain.outputs import Outputs, distinct_outputs, some_prompts
from pfm.explain.render import page, terminal
from pfm.explain.results import Direction, Results, TraitChange
from pfm.statistics import Bootstrap, Estimate, warn_of_few

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs
    from pfm.data.pairs import PreferencePairs
    from pfm.encoders import Encoder
    from pfm.flow.preference_flow import PreferenceFlow

__all__ = ["Explanation", "explain"]

FOLLOWED = 1 / 3  # of what the labels say of a trait: b that picks less follows them little


@dataclass(frozen=True)
class Explanation(Results):
    """Describes what a flow prefers: print it, save it as JSON, or as one self-contained HTML page.

    For the attributes see :class:`pfm.explain.results.Results`.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def save_json(self, path: str | Path) -> Path:
        """Write everything as JSON, and return the path."""
        path = Path(path).expanduser()
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return path

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML page, and return the path."""
        path = Path(path).expanduser()
        path.write_text(page(self), encoding="utf-8", errors="xmlcharrefreplace")
        return path

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from terminal(self, options.max_width)


@standard_defaults
def explain(
    flow: PreferenceFlow,
    pairs: PreferencePairs,
    encoder: Encoder,
    *,
    directions: int = 2,
    contrasts: int = 3,
    terms: int = 10,
    max_outputs: int = 10_000,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Explanation:
    """Describe the directions along which a flow moves the outputs of given pairs, in words and with real texts.

    Better give pairs of prompts that the flow was not fitted on; how b orders those that it was is flattered.

    Args:
        flow: the flow. pairs: labelled pairs with their texts. encoder: the one that the flow was fitted with.
        directions: principal directions beside the mean displacement and b.
        contrasts: pairs of texts for each direction, each of another prompt.
        terms: contrastive terms for each end.
        max_outputs: look at so many outputs at most, of prompts drawn at random.
        resamples: of the bootstrap over prompts; over outputs, where there is one prompt only.
        seed: of the bootstrap, the folds and that draw.
        progress: show a progress bar while texts are encoded.

    Raises:
        ValueError: the embeddings do not fit the flow, or an argument is out of range.

    >>> import pfm
    >>> from pfm.encoders import SurfaceEncoder
    >>> rows = [{"prompt": f"Ask {n}", "chosen": f"Yes, {n} times!", "rejected": f"no {n}"} for n in range(40)]
    >>> pairs, encoder = pfm.PreferencePairs.from_rows(rows), SurfaceEncoder()
    >>> encoded = pairs.encode(encoder, progress=False)
    >>> flow = pfm.PreferenceFlow.fit(encoded, pfm.FlowConfig(residual=False), progress=False)
    >>> explanation = explain(flow, pairs, encoder, resamples=20, progress=False)
    >>> explanation.confirmed, explanation.accuracy.value
    (True, 1.0)
    """
    seed = check_seed(seed)
    for name, value, least in (("directions", directions, 0), ("contrasts", contrasts, 0), ("terms", terms, 0),
                               ("max_outputs", max_outputs, 4), ("resamples", resamples, 20)):  # fmt: skip
        check_whole(name, value, least)
    kept = some_prompts(pairs, max_outputs, seed)
    shown = pairs if kept is None else pairs.select(kept)
    encoded = shown.encode(encoder, context=flow.context_dimension > 0, progress=progress)
    if encoded.event_shape != flow.event_shape or encoded.context_dimension != flow.context_dimension:
        raise ValueError(
            f"encoder must give outputs {tuple(flow.event_shape)} and contexts of {flow.context_dimension} values, as "
            f"the flow was fitted: got {tuple(encoded.event_shape)} and {encoded.context_dimension}"
        )
    outputs = distinct_outputs(shown, encoded)
    bootstrap = Bootstrap(int(outputs.unit.max()) + 1, resamples, seed)

    b = flow.win_probability(outputs.y, outputs.context).double().cpu().numpy()
    moved = flow.transport(outputs.y, outputs.context, mode="relabel" if flow.rounds > 1 else "single")
    scale = flow.normalizer.scale.cpu()
    displacement = ((moved.cpu() - outputs.y).flatten(1) / scale).double().numpy()
    place = outputs.centred((outputs.y.flatten(1) / scale).double().numpy())

    names, traits = varying_traits(outputs)
    changes, fit_errors, told = moved_traits(place, displacement, traits, outputs, seed)
    label_weight, label_value = pair_labels(encoded)
    accuracy, z = accuracy_of(b, outputs, encoded, label_value, bootstrap)
    found = trait_changes(
        names, traits, changes, fit_errors, told, b, label_weight * label_value, label_weight, outputs, bootstrap
    )  # fmt: skip
    length = None
    if "words" in names:
        share = correlations(traits[:, [names.index("words")]], outputs.centred(b), outputs, bootstrap, squared=True)
        length = share[0]
    axes = find_directions(
        directions, contrasts, terms, place, displacement, b, names, traits, outputs, bootstrap
    )  # fmt: skip
    return _told(flow, encoded, outputs, found, length, accuracy, z, axes, kept is not None, seed, resamples)


def _told(
    flow: PreferenceFlow,
    encoded: EncodedPairs,
    outputs: Outputs,
    traits: list[TraitChange],
    length: Estimate | None,
    accuracy: Estimate,
    z: float,
    directions: list[Direction],
    thinned: bool,
    seed: int,
    resamples: int,
) -> Explanation:
    guarded = math.isinf(flow.guard_margin)
    confirmed = not guarded and z > CONFIRMED
    win: Mapping[str, Any] = flow.metadata.get("win") or {}
    reasons = []
    if win.get("accuracy") is not None:
        errors = "" if win.get("z") is None else f", z-score {win['z']:.1f} against chance"
        reasons.append(
            f"On prompts held out of its fit, the flow's b ordered {win['accuracy']:.1%} of pairs rightly{errors}."
        )
    decided = int(encoded.decided.sum())
    beside = f" (further {len(encoded) - decided} are labelled as ties)" if decided < len(encoded) else ""
    reasons.append(f"It orders {accuracy.text(percent=True)} of the {decided} given pairs as their labels do{beside}.")
    if guarded:
        reasons.append("That confirms no gain, so the flow's guard keeps every output unchanged.")
    elif not confirmed:
        reasons.append("The given pairs do not confirm it.")
    spoken = [trait for trait in traits if trait.confirmed] if confirmed else []
    if not confirmed:
        summary = "No confirmed direction: the displacement cannot be distinguished from noise."
    elif spoken:
        summary = _prefers(spoken)
    else:
        summary = "Prefers some outputs, and no surface trait says which: read the texts at both ends."
    return Explanation(
        confirmed=confirmed,
        summary=summary,
        reasons=reasons,
        warnings=_warnings(flow, encoded, outputs, traits, length, confirmed, thinned),
        length_share=length,
        accuracy=accuracy,
        traits=traits,
        directions=directions if confirmed else [],
        settings={
            "pairs": len(encoded),
            "prompts": int(outputs.group.max()) + 1,
            "outputs": len(outputs.texts),
            "resamples": resamples,
            "resampled": "prompts" if outputs.group.max() > 0 else "outputs",
            "seed": seed,
            "source": flow.config.source,
            "rounds": flow.rounds,
            "encoder": flow.metadata.get("encoder"),
            "fitted_pairs": flow.metadata.get("pairs"),
        },
    )


def _prefers(spoken: list[TraitChange]) -> str:
    own = [trait for trait in spoken if not trait.with_length]
    along = [trait for trait in spoken if trait.with_length]
    said = [f"{trait.words} ({_change(trait, trait.picked)} sd)" for trait in own or along]
    text = "Prefers " + ", ".join(said[:6]) + (f" and {len(said) - 6} more" if len(said) > 6 else "")
    if own and along:
        text += "; with the length come " + ", ".join(trait.words for trait in along[:4])
    return text + "."


def _change(trait: TraitChange, change: Estimate) -> str:
    """Write a change of a trait in the direction of its words."""
    return (trait.towards(change) or change).parts(signed=True, decimals=2)[0]


def _warnings(
    flow: PreferenceFlow,
    encoded: EncodedPairs,
    outputs: Outputs,
    traits: list[TraitChange],
    length: Estimate | None,
    confirmed: bool,
    thinned: bool,
) -> list[str]:
    found = []
    prompts = int(outputs.group.max()) + 1
    if confirmed and length is not None and length.value >= 0.5:
        words = next((trait.words for trait in traits if trait.name == "words"), "longer")
        found.append(
            f"Length explains most of b: {length.text(percent=True)} of its variance within prompts. This flow mostly "
            f"prefers {words} outputs; compare at equal length before trusting it."
        )
    if confirmed:
        untold = [trait for trait in traits if trait.confirmed and trait.told < 0.1]
        if untold:
            names = ", ".join(trait.name.replace("_", " ") for trait in untold[:5])
            found.append(f"The embedding predicts {names} poorly: changes of them go undetected in the displacement.")
        weak = [
            trait for trait in traits
            if trait.confirmed and trait.told < 0.5 and abs(trait.picked.value) < FOLLOWED * abs(trait.labelled.value)
        ]  # fmt: skip
        if weak:
            said = ", ".join(
                f"{trait.words} ({_change(trait, trait.picked)} of {_change(trait, trait.labelled)} sd)"
                for trait in weak[:3]
            )
            found.append(
                f"b picks less than a third of what the labels say: {said}. It cannot prefer what the embedding does "
                "not hold; an encoder that sees length and layout, such as minilm+surface, may."
            )
    if not traits:
        found.append("No trait varies between the outputs of one prompt: only the texts can say what is preferred.")
    if prompts == 1:
        found.append(
            "All pairs belong to one prompt: intervals are over its outputs, and say nothing of other prompts."
        )
    elif few := warn_of_few(prompts):
        found.append(few)
    if thinned:
        found.append(f"Looked at {len(outputs.texts)} outputs of {prompts} prompts, drawn at random from all given.")
    if encoded.encoder and flow.metadata.get("encoder") and encoded.encoder != flow.metadata["encoder"]:
        found.append("The encoder describes itself otherwise than the one that the flow was fitted with.")
    return found
