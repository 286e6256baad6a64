"""Finished runs, as they lie on disk."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.core.runner import ARRAYS, METRICS
from benchmarks.core.schemas import method_settings

__all__ = ["Run", "code_notes", "collect", "common_setting", "grouped"]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what metrics.json says.

    ``variant`` names the settings in which its method differs from the other runs of that name, as :func:`collect`
    finds them: "" for most, such as "label_rounds=5" for others.
    """

    folder: Path
    metrics: dict[str, Any]
    variant: str = field(default="", kw_only=True)

    @property
    def kind(self) -> str:
        """Return the kind of its task: "selection" or "law"."""
        return self.metrics.get("kind", "selection")  # the only kind there was when runs did not say

    @property
    def task(self) -> str:
        """Return the name of the task."""
        return self.metrics["settings"]["task"]["name"]

    @property
    def method(self) -> str:
        """Return the name of the method, and of its variant."""
        name = self.metrics["settings"]["method"]["name"]
        return f"{name}[{self.variant}]" if self.variant else name

    @property
    def label(self) -> str:
        """Return the method's name in tables, and that of its variant."""
        label = self.metrics["settings"]["method"]["label"]
        return f"{label}, {self.variant}" if self.variant else label

    @property
    def seed(self) -> int:
        """Return the seed."""
        return self.metrics["settings"]["seed"]

    @property
    def setting(self) -> str:
        """Return all settings but method and seed, as one text: what runs must share to be compared."""
        return common_setting(self, [name for name in self.metrics["settings"] if name not in ("method", "seed")])

    @property
    def arrays(self) -> Path:
        """Return the file of what the run kept beside its metrics."""
        return self.folder / ARRAYS[self.kind]


AnyRun = TypeVar("AnyRun", bound=Run)


def collect(paths: Iterable[Path], seeds: Sequence[int] | None = None) -> list[Run]:
    """Read all finished runs below some folders, or those of some ``seeds``; of equal settings the latest run counts.

    Runs of one method on one task whose settings differ, seeds aside, are variants: those with the settings of the
    method in ``conf/`` keep its name, the others say in what they differ. Of a method that is not there the variant
    of most runs keeps it, and of these the first that was run.

    Raises:
        ValueError: there is none, or none of one of the seeds.
    """
    found: dict[str, Run] = {}
    paths = list(paths)
    for root in paths:
        for path in root.rglob(METRICS):
            run = Run(path.parent, json.loads(path.read_text(encoding="utf-8")))
            known = found.get(run.metrics["key"])
            if known is None or known.metrics["finished"] < run.metrics["finished"]:
                found[run.metrics["key"]] = run
    if not found:
        raise ValueError(f"no finished run ({METRICS}) in {', '.join(map(str, paths))}")
    if missing := set(seeds or ()) - {run.seed for run in found.values()}:
        raise ValueError(
            f"no finished run of seed {', '.join(map(str, sorted(missing)))} in {', '.join(map(str, paths))}"
        )
    return _variants_named([run for run in found.values() if not seeds or run.seed in seeds])


def _variants_named(runs: list[Run]) -> list[Run]:
    """Tell runs of one method apart whose settings differ."""
    by_method: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.metrics["finished"]):
        by_method[run.task, run.method].append(run)
    named = []
    for mine in by_method.values():
        variants: list[tuple[dict[str, Any], list[Run]]] = []
        for run in mine:
            settings = _leaves(run.metrics["settings"]["method"])
            for known, members in variants:
                if not _differing(known, settings):
                    known |= settings
                    members.append(run)
                    break
            else:
                variants.append((settings, [run]))
        base = max(variants, key=lambda variant: len(variant[1]))[0]
        if len(variants) > 1:
            base = _own(mine[0]) or base
        for settings, members in variants:
            variant = _told(base, settings)
            named += [replace(run, variant=variant) for run in members]
    return named


def _own(run: Run) -> dict[str, Any] | None:
    """Return what ``conf/`` sets for the run's method; None where it has no such method."""
    method = run.metrics["settings"]["method"]
    own = method_settings(method["name"], method.get("family", ""))
    return None if own is None else _leaves(own)


def _told(base: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={settings.get(name)}" for name in _differing(base, settings))


def _leaves(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the settings by their dotted names, without seeds and what a method is called."""
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{above}{name}.")
        elif name not in ("seed", "label"):
            leaves[f"{above}{name}"] = value
    return leaves


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name the settings that are not the same.

    An option that is not given has its default. A field of a method's own that one of them lacks is another matter:
    the code of then did not know it.
    """
    return [
        name
        for name in {**one, **other}
        if one.get(name) != other.get(name) and ("." in name or (name in one and name in other))
    ]


def common_setting(run: Run, names: Sequence[str]) -> str:
    """Return some of a run's settings as one text: what runs must share to be compared."""
    return json.dumps({name: run.metrics["settings"][name] for name in names})


def grouped(
    runs: Sequence[AnyRun], alike: Callable[[AnyRun, AnyRun], bool], did: str
) -> list[dict[str, dict[int, AnyRun]]]:
    """Group runs of equal setting: in each group every method's runs by seed, seeds in order.

    Args:
        runs: of any settings.
        alike: whether two runs of one setting and seed were given the same things.
        did: what they did with them, such as "choose among the same candidates".

    Raises:
        ValueError: two runs of one setting and seed are not alike.
    """
    groups: dict[str, dict[str, dict[int, AnyRun]]] = defaultdict(lambda: defaultdict(dict))
    first: dict[tuple[str, int], AnyRun] = {}
    for run in sorted(runs, key=lambda run: (run.setting, run.seed)):
        other = first.setdefault((run.setting, run.seed), run)
        if not alike(run, other):
            raise ValueError(
                f"{run.folder} and {other.folder} did not {did}: the data or the task's code changed in between; "
                "repeat the older with force=true"
            )
        groups[run.setting][run.method][run.seed] = run
    return list(groups.values())


def code_notes(runs: Sequence[Run]) -> list[str]:
    """Say which methods lack seeds that others have or had settings of their own, and whether the code was one."""
    seeds = {run.seed for run in runs}
    of_method = {
        name: {run.seed for run in runs if run.method == name} for name in dict.fromkeys(r.method for r in runs)
    }
    notes = [
        f"{name} has no run of seed {', '.join(map(str, sorted(seeds - found)))}: its figures are of other splits."
        for name, found in of_method.items()
        if seeds - found
    ]
    notes += [
        f"{name} was run with {told}, unlike its settings in conf/."
        for name, run in {run.method: run for run in runs if not run.variant}.items()
        if (own := _own(run)) and (told := _told(own, _leaves(run.metrics["settings"]["method"])))
    ]
    versions = {run.metrics["environment"]["code"] for run in runs}
    if len(versions) > 1:
        notes.append(f"These runs are of {len(versions)} states of the code: {', '.join(sorted(versions))}.")
    return notes
