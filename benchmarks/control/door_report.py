"""Tables and a figure of what the splits of the door found, see :mod:`benchmarks.control.door`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.tables import markdown_table
from pfm.statistics import Estimate, interval

__all__ = ["estimate", "plain_setting", "summarise", "write_report"]

Array = NDArray[np.float64]
Sums = list[tuple[Any, Any]]
"""Of each split: a numerator and a denominator for every cluster."""

RESAMPLES = 2000
JUDGE = "ahead"
ALONE = ("steps left", "states", "actions", "residuals", "first state", "network: states")
_GREY = "#555555"
_COLORS = {
    "flow": "#0072b2", "flow, best of 8": "#56b4e9", "ascent": "#009e73", "mean shift": "#d55e00",
    "mean shift by a network": "#e69f00", "BC of winners": "#cc79a7", "best of 8": "#882255",
    "flow, choosing among 8": "#117733",
}  # fmt: skip


def write_report(results: list[dict[str, Any]], out: Path) -> str:
    """Write results.json, door.md and door.png; give the tables."""
    found = summarise(results)
    text = _markdown(found)
    (out / "results.json").write_text(json.dumps(found, indent=1, default=_json) + "\n", encoding="utf-8")
    (out / "door.md").write_text(text, encoding="utf-8")
    _plot(found, out / "door.png")
    return text


def estimate(sums: Sums, less: Sums | None = None) -> Estimate:
    """Return the mean over splits of the ratio of sums, with an interval over splits; of one split, over its clusters.

    ``less`` is taken off, in the same resamples.
    """
    random = np.random.default_rng(0)
    values, drawn = np.zeros(len(sums)), np.zeros((RESAMPLES, len(sums)))
    for split, (top, _) in enumerate(sums):
        counts = random.multinomial(len(top), np.full(len(top), 1 / len(top)), size=RESAMPLES)
        for sign, part in ((1, sums), (-1, less)):
            if part is not None:
                over, under = (np.asarray(each, dtype=np.float64) for each in part[split])
                values[split] += sign * over.sum() / under.sum()
                drawn[:, split] += sign * (counts @ over) / (counts @ under)
    # What a split owes to its own clusters is part of its difference from the others.
    samples, units = drawn[:, 0], len(sums[0][0])
    if len(sums) > 1:
        samples, units = values[random.integers(len(sums), size=drawn.shape)].mean(1), len(sums)
    found = interval(float(values.mean()), samples, units)
    assert found is not None
    return found


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every figure of the tables, as estimates."""
    told = [result["foretold"] for result in results]

    def correlation(products: list[Any]) -> Estimate:
        return estimate([(each, part["steps"]) for each, part in zip(products, told, strict=True)])

    real = [sum(part["came"][JUDGE]) for part in told]
    shuffled = [[sum(each) for each in part["shuffled"]] for part in told]
    return {
        "splits": len(results),
        "pairs": [result["pairs"] for result in results],
        "states": [result["states"] for result in results],
        "clone_r2": _single([result["clone_r2"] for result in results]),
        "radius": _single([result["radius"] for result in results]),
        "labels": {name: _described(results, name) for name in results[0]["labels"]["right"]},
        "readings": {
            kind: {
                "came": correlation([part["came"][kind] for part in told]),
                "judge": correlation([part["judge"][kind] for part in told]),
                "agreement": _single([part["agreement"][kind] for part in told]),
            }
            for kind in told[0]["came"]
        },
        "horizons": {
            ahead: estimate([(each["horizons"][ahead]["came"], each["horizons"][ahead]["steps"]) for each in results])
            for ahead in results[0]["horizons"]
        },
        "motion known": correlation([part["motion known"] for part in told]),
        "labels shuffled": correlation([np.mean(part["shuffled"], axis=0) for part in told]),
        "shuffles as high": float(np.mean([np.array(s) >= r for s, r in zip(shuffled, real, strict=True)])),
        "judges": {name: estimate(_pairs(results, "judges", "right", name)) for name in results[0]["judges"]["right"]},
        "methods": {
            kind: {
                name: [_method(results, kind, name, place) for place in range(len(entry["found"]))]
                for name, entry in known.items()
            }
            for kind, known in results[0]["methods"].items()
        },
        "seconds": float(np.mean([result["seconds"] for result in results])),
    }


def _single(values: list[float]) -> Estimate:
    return estimate([([value], [1.0]) for value in values])


def _described(results: list[dict[str, Any]], name: str) -> dict[str, Estimate]:
    beside = _beside(name)
    return {
        "accuracy": estimate(_pairs(results, "labels", "right", name)),
        "gain": estimate(_pairs(results, "labels", "right", name), _pairs(results, "labels", "right", beside)),
        "loss": estimate(_pairs(results, "labels", "loss", name)),
        "loss gain": estimate(_pairs(results, "labels", "loss", beside), _pairs(results, "labels", "loss", name)),
    }


def _beside(name: str) -> str:
    """Name the description without actions, beside which one with actions stands."""
    if name.startswith("network"):
        return "network: states"
    return "first state" if name.startswith("first") else "states"


def _pairs(results: list[dict[str, Any]], part: str, key: str, name: str) -> Sums:
    """Sum what is known of held-out pairs by the episode of their first segment."""
    sums: Sums = []
    for result in results:
        names, member = np.unique(result[part]["cluster"], return_inverse=True)
        sums.append((np.bincount(member, result[part][key][name], len(names)), np.bincount(member)))
    return sums


def _method(results: list[dict[str, Any]], kind: str, name: str, place: int) -> dict[str, Any]:
    """Return the figures of one setting of a method, per step of held-out episodes."""
    settings = results[0]["methods"][kind][name]["found"][place]["settings"]

    def sums(figure: str, over: str = "steps", of: tuple[str, int] = (name, place)) -> Sums:
        each = [result["methods"][kind][of[0]]["found"][of[1]] for result in results]
        return [(one[figure], one[over]) for one in each]

    shown = [key for key in results[0]["methods"][kind][name]["found"][place] if key.startswith(("gain", "better"))]
    figures: dict[str, Any] = {key: estimate(sums(key)) for key in (*shown, "moved", "off support", "from people")}
    figures["came"] = estimate(sums("came", "came steps"))
    if figures["moved"].value > 0:
        gain = f"gain: {JUDGE}"
        figures["of best"] = estimate(sums(gain, f"bound: {JUDGE}"))
        figures["by distance"] = estimate(sums(gain, "moved"))
        if "flow" in results[0]["methods"][kind]:
            flow = ("flow", plain_setting(results[0]["methods"][kind]["flow"]["found"]))
            figures["lead"] = estimate(sums(gain, "moved", flow), sums(gain, "moved"))
    return {"settings": settings, **figures}


def plain_setting(found: list[dict[str, Any]]) -> int:
    """Find where a method is as it is: strength or length 1, or the only candidate."""
    return next(
        (place for place, each in enumerate(found)
         if 1.0 in (each["settings"].get("strength"), each["settings"].get("length"))),
        0,
    )  # fmt: skip


def _markdown(found: dict[str, Any]) -> str:
    learned, judged = np.array(found["pairs"]).T
    lines = [
        "# Doors: offline control from people's labels",
        "",
        f"{found['splits']} splits of the episodes; {learned.min()} to {learned.max()} labelled pairs to learn from,",
        f"{judged.min()} to {judged.max()} to judge by; {min(found['states']):,} to {max(found['states']):,} states",
        f"with two proposals each. The cloned policy explains {found['clone_r2'].text(percent=True)} of held-out",
        "actions. Intervals are over splits and the held-out episodes of each.",
        "",
        "What orders held-out pairs as people did; gains are over the same without actions, paired:",
        "",
    ]
    rows = [["known of both segments", "accuracy", "gain, points", "log loss", "gain, nats"]]
    for name, each in found["labels"].items():
        gain = each["gain"].text(percent=True, signed=True).replace("%", "")
        less = each["loss gain"].text(signed=True, decimals=3)
        rows.append([name, each["accuracy"].text(percent=True), "" if name in ALONE else gain,
                     each["loss"].text(decimals=3), "" if name in ALONE else less])  # fmt: skip
    lines += [
        *markdown_table(rows),
        "",
        "What readings of the training side foretell, as correlations: what came after people's actions in held-out",
        "episodes, above what was to be expected of the state. Beside it the same for judges, in episodes of their own",
        "side that they had not read, and how far readings and judges agree on what actions are worth:",
        "",
    ]
    rows = [["reading", "what came", "judge, on its own side", "agreement"]]
    for kind, each in found["readings"].items():
        rows.append([kind, *(each[key].text(decimals=2) for key in ("came", "judge", "agreement"))])
    rows += [
        *([f"{JUDGE} by {steps} steps", each.text(decimals=2), "", ""] for steps, each in found["horizons"].items()),
        [f"{JUDGE}, given also how the state had moved", found["motion known"].text(decimals=2), "", ""],
        [f"{JUDGE}, people's labels shuffled", found["labels shuffled"].text(decimals=2), "", ""],
    ]
    lines += [
        *markdown_table(rows),
        "",
        f"Of the shuffles, {100 * found['shuffles as high']:.0f}% foretell as much as the labels do. Judges of pairs,",
        "in episodes of their own side that they had not read, are right in "
        + ", ".join(f"{each.text(percent=True)} ({name})" for name, each in found["judges"].items())
        + ".",
        "",
        f'Methods, learned from pairs that the reading "{JUDGE}" labelled. The gain is by the held-out judge, in',
        "standard deviations of what people do there, as is the distance moved; of the best step: of what a step as",
        "long along the judge's own slope would gain; what came: how going the method's way correlates with it,",
        "without a judge of actions:",
        "",
    ]
    rows = [
        ["method", "gain", "gain by distance", "flow's lead in that", "of the best step", "states better", "what came",
         "moved", "off support", "from people's actions"]
    ]  # fmt: skip
    for name, settings in found["methods"].get(JUDGE, {}).items():
        each = settings[plain_setting(settings)]
        rows.append([
            name, each[f"gain: {JUDGE}"].text(signed=True, decimals=2),
            each["by distance"].text(signed=True, decimals=2) if "by distance" in each else "",
            each["lead"].text(signed=True, decimals=2) if "lead" in each and name != "flow" else "",
            each["of best"].text(percent=True, decimals=0) if "of best" in each else "",
            each[f"better: {JUDGE}"].text(percent=True, decimals=0), each["came"].text(signed=True, decimals=2),
            f"{each['moved'].value:.2f}", f"{100 * each['off support'].value:.1f}%", f"{each['from people'].value:.2f}",
        ])  # fmt: skip
    lines += [*markdown_table(rows), "", "Every reading by every judge, gains:", ""]
    judges = list(found["readings"])
    rows = [["labelled by", *(f"judge: {judge}" for judge in judges), "what came"]]
    for kind, known in found["methods"].items():
        for name in ("mean shift by a network", "flow"):
            if name in known:
                each = known[name][plain_setting(known[name])]
                shown = [each[key] for key in (*(f"gain: {judge}" for judge in judges), "came")]
                rows.append([f"{kind}: {name}", *(value.text(signed=True, decimals=2) for value in shown)])
    return "\n".join([*lines, *markdown_table(rows)]) + "\n"


def _plot(found: dict[str, Any], path: Path) -> None:
    """Draw what labels say of actions, and what methods gain over how far they go."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.8), constrained_layout=True)
    names = [name for name in reversed(found["labels"]) if name not in ALONE]
    for place, name in enumerate(names):
        gain, color = found["labels"][name]["gain"], _GREY if "elsewhere" in name else _COLORS["flow"]
        left.plot([100 * gain.low, 100 * gain.high], [place, place], color=color, linewidth=2)
        left.plot(100 * gain.value, place, "o", color=color, markersize=6, markeredgecolor="white")
    left.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("held-out pairs ordered as people did: points beyond the same without actions")
    left.set_title("what people's labels say of actions", fontsize=11)
    for name, known in found["methods"].get(JUDGE, {}).items():
        x, y = [each["moved"].value for each in known], [each[f"gain: {JUDGE}"] for each in known]
        if len(known) == 1:
            right.plot([x[0], x[0]], [y[0].low, y[0].high], color=_GREY, linewidth=1.2)
            right.plot(x[0], y[0].value, "x", color=_GREY, markersize=6)
            place = (5, -11) if "shuffled" in name else (5, 4)  # beside the clone, which it hardly leaves
            right.annotate(name, (x[0], y[0].value), place, textcoords="offset points", fontsize=8, color=_GREY)
            continue
        width = 2.6 if name == "flow" else 1.4
        gains = [each.value for each in y]
        right.plot(x, gains, "o-", label=name, color=_COLORS.get(name), markersize=4, linewidth=width)
        if name == "flow":
            low, high = [each.low for each in y], [each.high for each in y]
            right.fill_between(x, low, high, color=_COLORS[name], alpha=0.15, linewidth=0)
    right.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
    right.axvline(found["radius"].value, color="0.6", linewidth=0.8, linestyle="--", label="99% of what people do")
    right.set_xlabel("distance from the cloned policy, standard deviations of people's own")
    right.set_ylabel("gain by the held-out judge, standard deviations")
    right.set_title("people's reward of states, carried to actions by what followed", fontsize=11)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _json(value: Any) -> Any:
    if isinstance(value, Estimate):
        return [round(each, 5) for each in (value.value, value.low, value.high)]
    raise TypeError(f"{type(value).__name__} is no JSON value")
