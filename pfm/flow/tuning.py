"""Choose how far to follow a flow: strength, guidance, gradient of b and gate, on pairs held out from its fit.

A stronger transport raises the win probability and changes the output more. :func:`tune` measures both for every
setting of a grid and chooses by the trade-off that the caller states. The judge is not the flow's own b, which
``win_gradient`` climbs and would overrate: it is a win probability fitted on the held-out pairs, each half of the
prompts judged by a fit on the other half (:class:`HeldOutWin`). A setting is judged by labels that took no part in
choosing it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pfm._internal.checks import check_number, check_seed
from pfm._internal.significance import confirmable, confirmed, halves
from pfm.data.encoded import EncodedPairs
from pfm.devices import standard_defaults
from pfm.flow.config import FlowConfig
from pfm.flow.win import WinHead
from pfm.statistics import Bootstrap, Estimate

__all__ = ["HeldOutWin", "Setting", "TunedPoint", "Tuning", "grid", "tune"]

Content = Callable[[Tensor, Tensor], Tensor]
Decode = Callable[[Tensor, Tensor], Tensor]
Judge = Callable[[Tensor, Tensor | None], Tensor]

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
WIN_GRADIENTS = (0.0, 2.0, 8.0)
GUIDANCES = (1.0, 2.0)  # of flows with a field without contexts
DELETED = 8  # groups of prompts that the jackknife leaves out, one at a time
LEVEL = 0.05


@dataclass(frozen=True)
class Setting:
    """Names a flow and the arguments of its :meth:`~pfm.PreferenceFlow.transport`.

    >>> print(Setting("flow", strength=2.0, win_gradient=8.0))
    flow, strength 2, win_gradient 8
    """

    flow: str = "flow"
    mode: str = "single"
    strength: float = 1.0
    guidance: float = 1.0
    win_gradient: float = 0.0

    def __str__(self) -> str:
        words = [self.flow] + ([self.mode] if self.mode != "single" else []) + [f"strength {self.strength:g}"]
        words += [f"guidance {self.guidance:g}"] if self.guidance != 1 else []
        return ", ".join(words + ([f"win_gradient {self.win_gradient:g}"] if self.win_gradient else []))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``transport``."""
        return {key: value for key, value in asdict(self).items() if key != "flow"}


@dataclass(frozen=True)
class TunedPoint:
    """Holds what a setting does to held-out outputs, with 95% intervals over prompts.

    Attributes:
        setting: None for the outputs as they are.
        win_probability: mean of the judge's b, in [0, 1].
        gain: its mean difference from the outputs as they are, paired.
        content: mean similarity with the outputs as they are.
        objective: what the choice maximises; minus infinity where the content is below ``at_least``.
    """

    setting: Setting | None
    win_probability: Estimate
    gain: Estimate
    content: Estimate
    objective: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; an objective of minus infinity is None."""
        return asdict(self) | {"objective": self.objective if math.isfinite(self.objective) else None}


@dataclass
class Tuning:
    """Holds the chosen setting and the whole table; made by :func:`tune`.

    Attributes:
        best: the chosen setting; None where no gain is confirmed, so that outputs stay as they are.
        points: every setting, and first the outputs as they are.
        gain, content: estimates for the settings that each half of the prompts chooses for the other; None where
            nothing is chosen.
        p_value: one-sided, of that gain; below .05 it is confirmed.
        at_least, weight: the trade-off that was asked for.
        flows: the flows by name.
    """

    best: Setting | None
    points: list[TunedPoint]
    gain: Estimate | None
    content: Estimate | None
    p_value: float
    at_least: float | None
    weight: float | None
    flows: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def flow(self) -> Any:
        """Return the chosen flow; of several the first where nothing is chosen."""
        return self.flows[self.best.flow] if self.best is not None else next(iter(self.flows.values()))

    @property
    def frontier(self) -> list[TunedPoint]:
        """Return the points that no other exceeds in both win probability and content, by falling content."""
        ordered = sorted(self.points, key=lambda point: (-point.content.value, -point.win_probability.value))
        found: list[TunedPoint] = []
        for point in ordered:
            if not found or point.win_probability.value > found[-1].win_probability.value:
                found.append(point)
        return found

    def transport(self, y: Any, context: Any = None, **options: Any) -> Tensor:
        """Carry outputs (B, \\*D) by the chosen setting; without one they come back as they are.

        Args:
            y, context, options: as for :meth:`pfm.PreferenceFlow.transport`.
        """
        chosen = self.best.arguments() if self.best is not None else {"strength": 0.0}
        return self.flow.transport(y, context, **{**chosen, **options})

    def __str__(self) -> str:
        wanted = f"content >= {self.at_least:g}" if self.at_least is not None else f"b + {self.weight:g} content"
        rows = [("setting", "b", "gain", "content", "")]
        for point in self.frontier:
            mark = "<- chosen" if point.setting == self.best else ""
            rows.append((
                str(point.setting or "unchanged"), point.win_probability.text(decimals=3),
                point.gain.text(signed=True, decimals=3), point.content.text(decimals=3), mark,
            ))  # fmt: skip
        widths = [max(len(row[place]) for row in rows) for place in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
        head = f"{len(self.points) - 1} settings, by {wanted}; the frontier:"
        if self.best is None or self.gain is None or self.content is None:
            tail = "no setting's gain is confirmed: outputs stay as they are"
        else:
            tail = (
                f"on prompts that took no part in the choice: gain {self.gain.text(signed=True, decimals=3)}, "
                f"content {self.content.text(decimals=3)}"
            )
        return "\n".join([head, *(line.rstrip() for line in lines), tail])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "best": None if self.best is None else asdict(self.best),
            "gain": None if self.gain is None else asdict(self.gain),
            "content": None if self.content is None else asdict(self.content),
            "p_value": self.p_value, "at_least": self.at_least, "weight": self.weight,
            "points": [point.to_dict() for point in self.points],
        }  # fmt: skip

    def save_json(self, path: str | Path) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    def save_plot(self, path: str | Path) -> None:
        """Draw win probability against content, one curve a flow, the frontier and the choice marked."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for name in self.flows:
            of_flow = [point for point in self.points if point.setting is not None and point.setting.flow == name]
            axes.scatter(*_places(of_flow), s=22, alpha=0.65, label=name)
        axes.plot(*_places(self.frontier), color="#555555", linewidth=1, zorder=0, label="frontier")
        axes.scatter(*_places(self.points[:1]), marker="s", color="#555555", label="unchanged")
        chosen = [point for point in self.points if point.setting is not None and point.setting == self.best]
        if chosen:
            axes.scatter(*_places(chosen), s=130, facecolors="none", edgecolors="#d55e00", linewidths=2, label="chosen")
        if self.at_least is not None:
            axes.axvline(self.at_least, color="#999999", linestyle=":", linewidth=1)
        axes.set(xlabel="content kept", ylabel="win probability by the judge")
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(path, dpi=130)


def grid(
    flow: Any,
    name: str = "flow",
    *,
    strengths: Sequence[float] = STRENGTHS,
    win_gradients: Sequence[float] = WIN_GRADIENTS,
) -> list[Setting]:
    """Return the settings that are tried for a flow: its modes, strengths, guidances and gradients of b.

    A flow with ``source="rejected"`` is also tried with the gate, one with a field without contexts also with
    guidance 2, one of several rounds with ``mode="relabel"``.
    """
    config = getattr(flow, "config", None)
    modes = ["single"]
    if isinstance(config, FlowConfig) and config.source == "rejected":
        modes.append("gated")
    if getattr(flow, "rounds", 1) > 1:
        modes.append("relabel")
    guidances = GUIDANCES if getattr(flow, "context_free", None) is not None else GUIDANCES[:1]
    return [Setting(name, *each) for each in itertools.product(modes, strengths, guidances, win_gradients)]


@torch.no_grad()
@standard_defaults
def tune(
    flow: Any,
    validation: EncodedPairs,
    *,
    at_least: float | None = None,
    weight: float | None = None,
    settings: Sequence[Setting] | None = None,
    judge: Judge | None = None,
    content: Literal["cosine"] | Content = "cosine",
    decode: Decode | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tuning:
    """Choose among flows and settings of ``transport`` by the win probability and the content that remains.

    Args:
        flow: a fitted flow, or a dict of some by name, such as flows with ``best_of`` of 2 and 8.
        validation: pairs of prompts that the flow was not fitted on; their outputs are transported.
        at_least: the win probability is maximised among settings whose mean content is at least this.
        weight: b + weight content is maximised instead; content of an unchanged output is 1. Exactly one of the two.
        settings: those to try; None for :func:`grid` of each flow.
        judge: gives b (N,) of outputs (N, \\*D) under contexts (N, C) or None: a judge of one's own, which the flow
            was not fitted on, whose values are taken as they are; None fits a :class:`HeldOutWin` on ``validation``,
            which can also be given, to serve several calls.
        content: "cosine" of output and transported output, or a function of both (N, \\*D) that gives (N,).
        decode: what a decoder makes of transported points: a function of points and outputs (N, \\*D) that gives the
            vectors (N, \\*D) of what it writes, which are judged in place of the points.
        seed: of the judges' folds.
        progress: show a progress bar.

    Returns:
        the choice and the table. Its gain must be confirmed at one-sided 5%, in a test in which each half of the
        prompts judges the setting that the other half chose; otherwise outputs stay as they are.

    Raises:
        ValueError: not exactly one of ``at_least`` and ``weight``, settings of unknown flows, shapes that disagree, or
            values of ``judge``, ``content`` or ``decode`` that are not finite.

    >>> rejected, chosen = torch.randn(2, 400, 1, generator=torch.Generator().manual_seed(0)).sort(0).values
    >>> fitted, held_out = EncodedPairs(chosen, rejected).split(held_out=0.5)
    >>> from pfm import PreferenceFlow
    >>> flow = PreferenceFlow.fit(fitted, FlowConfig(residual=False), progress=False)
    >>> near = lambda before, after: 1 - (after - before).abs().squeeze(1)
    >>> tune(flow, held_out, at_least=0.5, content=near, progress=False).best.strength
    0.5
    """
    seed = check_seed(seed)
    flows: dict[str, Any] = dict(flow) if isinstance(flow, Mapping) else {"flow": flow}
    if not flows:
        raise ValueError("flow must be a flow or a dict of at least one: got an empty dict")
    if (at_least is None) == (weight is None):
        raise ValueError(
            f"exactly one of at_least and weight states the trade-off: got at_least={at_least}, weight={weight}; "
            "at_least=0.8 keeps 80% of the content, weight=1.0 counts a point of content as a point of b"
        )
    check_number("at_least", at_least, also=(None,))
    check_number("weight", weight, also=(None,))
    for name, each in flows.items():
        for what in ("event_shape", "context_dimension"):
            ours, theirs = getattr(each, what, None), getattr(validation, what)
            if ours is not None and ours != theirs:
                raise ValueError(f"validation must have the {what} of the flow {name!r}, {ours}: got {theirs}")
    tried = [s for name, each in flows.items() for s in grid(each, name)] if settings is None else list(settings)
    if not tried:
        raise ValueError("settings must hold at least one Setting: got none")
    if unknown := sorted({setting.flow for setting in tried} - set(flows)):
        raise ValueError(f"settings name flows that are not there: {', '.join(unknown)}; there are {', '.join(flows)}")
    group = validation.group
    if not confirmable(group):
        raise ValueError(
            f"validation must hold at least 5 prompts to confirm anything: got {len(torch.unique(group))}; "
            "hold more out of the fit"
        )
    if isinstance(judge, HeldOutWin) and judge.pairs is not validation:
        raise ValueError("judge is a HeldOutWin of other pairs: fit it on validation, HeldOutWin.fit(validation)")
    y, context, owner = _outputs(validation)
    judged_by = HeldOutWin.fit(validation, seed=seed, progress=progress) if judge is None else judge
    count = 1 + DELETED if isinstance(judged_by, HeldOutWin) else 1
    alike = _cosine if content == "cosine" else content
    if not callable(alike):
        raise ValueError(f"content must be 'cosine' or a function of outputs and transported outputs: got {content!r}")

    unmoved = _judged(judged_by(y, context), count, len(y)), torch.ones(len(y), dtype=torch.float64)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with tqdm(total=len(tried), desc="settings", disable=not progress) as bar:
        for place, moved in _carried(flows, tried, y, context):
            if decode is not None:
                moved = _decoded(decode(moved, y), y)
            judged = _judged(judged_by(moved, context), count, len(y))
            found[place] = judged, _checked("content", alike(y, moved), len(y))
            bar.update()
    b, kept = zip(unmoved, *(found[place] for place in range(len(tried))), strict=True)
    half = halves(torch.unique(group, return_inverse=True)[1]).repeat(2)
    part = judged_by.part.repeat(2) if isinstance(judged_by, HeldOutWin) else None
    return _Table(torch.stack(list(b), 1), torch.stack(list(kept)), owner, half, part, at_least, weight).chosen(
        flows, tried
    )


@dataclass(frozen=True)
class _Table:
    """Holds b and content of outputs as they are (first row) and under K settings.

    b: (R, 1 + K, N); R is 1 + DELETED for a :class:`HeldOutWin`, whose further values leave out one group of prompts
    each, and 1 for any other judge. kept: (1 + K, N). owner: (N,) prompts. part: (N,) the group that an output's prompt
    is in, or None.
    """

    b: Tensor
    kept: Tensor
    owner: Tensor
    half: Tensor
    part: Tensor | None
    at_least: float | None
    weight: float | None

    def objective(self, rows: Tensor) -> Tensor:
        """Return what is maximised, (1 + K,), on some of the outputs; unchanged outputs are always allowed."""
        b, kept = self.b[0][:, rows].mean(1), self.kept[:, rows].mean(1)
        if self.weight is not None:
            return b + self.weight * kept
        allowed = kept >= (self.at_least or 0.0) - 1e-9
        allowed[0] = True
        return torch.where(allowed, b, -math.inf)

    def estimate(self, values: Tensor, bounds: tuple[float, float] | None = None) -> Estimate:
        """Return the mean of values (R, N), or (N,), and its interval: over prompts, and over the judge's labels."""
        if values.dim() == 1 or len(values) == 1:
            _, prompt = torch.unique(self.owner, return_inverse=True)
            total, size = torch.zeros(2, int(prompt.max()) + 1, dtype=torch.float64)
            total.index_add_(0, prompt, values.view(-1))
            size.index_add_(0, prompt, torch.ones(len(prompt), dtype=torch.float64))
            found = Bootstrap(len(total)).ratio(total.numpy(), size.numpy(), bounds)
            assert found is not None
            return found
        from scipy.special import stdtrit

        mean, error = self.jackknife(values)
        low, high = (mean + sign * float(stdtrit(len(values) - 2, 0.975)) * error for sign in (-1, 1))
        if bounds is not None:
            low, high = max(low, bounds[0]), min(high, bounds[1])
        return Estimate(mean, low, high)

    def jackknife(self, values: Tensor) -> tuple[float, float]:
        """Return the mean of values (R, N) and its standard error by the delete-a-group jackknife."""
        assert self.part is not None
        left = torch.stack([row[self.part != number].mean() for number, row in enumerate(values[1:])])
        count = len(left)
        return float(values[0].mean()), math.sqrt((count - 1) / count * float((left - left.mean()).square().sum()))

    def p_value(self, gain: Tensor) -> float:
        """Return the one-sided p-value of the mean of a gain (R, N)."""
        if len(gain) == 1:
            return confirmed(gain[0], self.owner).p_value
        from scipy.special import stdtr

        mean, error = self.jackknife(gain)
        return float(stdtr(len(gain) - 2, -mean / max(error, 1e-12)))

    def chosen(self, flows: Mapping[str, Any], tried: Sequence[Setting]) -> Tuning:
        """Choose on all outputs; judge what each half chooses by the other."""
        objectives = self.objective(torch.ones_like(self.half))
        points = [
            TunedPoint(
                setting,
                self.estimate(self.b[:, k], (0.0, 1.0)),
                self.estimate(self.b[:, k] - self.b[:, 0]),
                self.estimate(self.kept[k]),
                float(objectives[k]),
            )
            for k, setting in enumerate([None, *tried])
        ]
        elsewhere = torch.zeros(len(self.half), dtype=torch.long)
        for part in (self.half, ~self.half):
            elsewhere[part] = int(self.objective(~part).argmax())
        rows = torch.arange(len(self.half))
        gain, kept = self.b[:, elsewhere, rows] - self.b[:, 0], self.kept[elsewhere, rows]
        place = int(objectives.argmax())
        p_value = self.p_value(gain) if place and bool(elsewhere.any()) else 1.0
        best = tried[place - 1] if place and p_value < LEVEL else None
        return Tuning(
            best=best,
            points=points,
            gain=self.estimate(gain) if best is not None else None,
            content=self.estimate(kept) if best is not None else None,
            p_value=p_value,
            at_least=self.at_least,
            weight=self.weight,
            flows=flows,
        )


class HeldOutWin:
    """Judges outputs of held-out pairs by win probabilities fitted on the pairs of other prompts.

    Each half of the prompts is judged by a fit on the other half. Eight more fits of either kind, each without one
    eighth of the prompts, say how far the judgement depends on the labels that there are (delete-a-group jackknife).
    The fits are linear in the output and some of its products; a network that also reads the context is added where
    held-out folds confirm it, which takes about a thousand pairs. With fewer, give :func:`tune` a judge of your own
    where the preferred direction depends on the context.
    """

    def __init__(self, pairs: EncodedPairs, heads: list[tuple[Tensor, list[WinHead]]], part: Tensor) -> None:
        self.pairs, self.heads, self.part = pairs, heads, part

    @classmethod
    @standard_defaults
    def fit(cls, pairs: EncodedPairs, *, seed: int = 0, progress: bool = True) -> HeldOutWin:
        """Fit the win probabilities.

        Args:
            pairs: N of them, of prompts that the flow was not fitted on, which are to be transported.
            seed: of the folds. progress: show a progress bar.

        Raises:
            ValueError: fewer prompts than 16.
        """
        seed = check_seed(seed)
        _, prompt = torch.unique(pairs.group, return_inverse=True)
        count = int(prompt.max()) + 1
        if count < 2 * DELETED:
            raise ValueError(
                f"validation must hold at least {2 * DELETED} prompts to fit a judge on: got {count}; hold more out of "
                "the fit, or give a judge of your own"
            )
        half, part = halves(prompt), (prompt // 2) % DELETED
        left_out = [torch.zeros_like(half), *(part == number for number in range(DELETED))]
        heads: list[tuple[Tensor, list[WinHead]]] = [(half, []), (~half, [])]
        bar = tqdm(total=2 * len(left_out), desc="judge", disable=not progress)
        for judged, fits in heads:
            # Preferences that depend on the context need one; it is fitted again where held-out folds confirm it.
            network = pairs.context_dimension > 0
            for without in left_out:
                head = WinHead(pairs.dimension, pairs.context_dimension)
                found = head.fit(pairs.select(~judged & ~without).to("cpu"), seed=seed, network=network)
                network = network and found.network_kept
                fits.append(head.eval())
                bar.update()
        bar.close()
        return cls(pairs, heads, part)

    @torch.no_grad()
    def __call__(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return b (9, 2 N) of the chosen and then the rejected outputs, as they are or moved, (2 N, \\*D)."""
        found = torch.empty(1 + DELETED, len(y), dtype=torch.float64)
        for judged, fits in self.heads:
            rows = judged.repeat(2)
            contexts = None if context is None else context[rows]
            for number, head in enumerate(fits):
                found[number, rows] = torch.sigmoid(head(y[rows].flatten(1), contexts)).double()
        return found


def _outputs(pairs: EncodedPairs) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return both members of each pair (2 N, \\*D), their contexts and their prompts."""
    y = torch.cat([pairs.chosen, pairs.rejected]).float().cpu()
    context = None if pairs.context is None else pairs.context.repeat(2, 1).float().cpu()
    return y, context, pairs.group.repeat(2)


def _carried(
    flows: Mapping[str, Any], tried: Sequence[Setting], y: Tensor, context: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield each setting's place in ``tried`` and what it moves y to; settings that differ in strength share passes."""
    alike: dict[Setting, list[int]] = {}
    for place, setting in enumerate(tried):
        alike.setdefault(replace(setting, strength=1.0), []).append(place)
    for setting, places in alike.items():
        flow, arguments = flows[setting.flow], setting.arguments()
        del arguments["strength"]
        strengths = [tried[place].strength for place in places]
        if len(places) > 1 and hasattr(flow, "transport_strengths"):
            yield from zip(places, flow.transport_strengths(y, context, strengths=strengths, **arguments), strict=True)
        else:
            for place, strength in zip(places, strengths, strict=True):
                yield place, flow.transport(y, context, strength=strength, **arguments)


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    return torch.cosine_similarity(before.flatten(1), after.flatten(1), dim=1)


def _judged(values: Any, count: int, rows: int) -> Tensor:
    return values if count > 1 else _checked("judge", values, rows)[None]


def _checked(name: str, values: Any, count: int) -> Tensor:
    found = torch.as_tensor(values).detach().double().cpu()
    if found.shape != (count,) or not bool(found.isfinite().all()):
        raise ValueError(f"{name} must give ({count},) finite numbers: got shape {tuple(found.shape)}")
    return found


def _decoded(vectors: Any, y: Tensor) -> Tensor:
    found = torch.as_tensor(vectors).float().cpu()
    if found.shape != y.shape or not bool(found.isfinite().all()):
        raise ValueError(f"decode must give {tuple(y.shape)} finite vectors: got shape {tuple(found.shape)}")
    return found


def _places(points: Sequence[TunedPoint]) -> tuple[list[float], list[float]]:
    return [point.content.value for point in points], [point.win_probability.value for point in points]
