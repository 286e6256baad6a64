"""Refine a policy in rounds: each collects labels around the policy of the round before.

One flow is learned near the reference, and carried far it leaves what its data knew. A refined policy is a policy
again: segments around it show what is better from there. In as many labels, several short steps then go further than
a long one wherever labels are easy to learn from.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pfm._internal.checks import check_choice, check_whole
from pfm._internal.files import claim_folder, replace_json
from pfm.flow.config import FlowConfig
from pfm.flow.preference_flow import PreferenceFlow
from pfm.pbrl.collection import collect, fingerprint, open_environment
from pfm.pbrl.flow_policy import FlowPolicy
from pfm.pbrl.policies import Policy
from pfm.pbrl.rollouts import episode_returns, episode_seeds

__all__ = ["Improvement", "PolicyRound", "improve", "load_improvement"]

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
FORMS = ("residual", "directions")  # of which the policy itself is the zero segment, whatever it is by now
VALIDATION = 1_000_003  # added to the seed: the starts of validation episodes are those of no collection
SETTINGS, CHOSEN, FLOW, SEGMENTS = "improvement.json", "chosen.json", "flow", "segments"


@dataclass(frozen=True)
class PolicyRound:
    """Holds the labels and the choice of one round.

    ``labels`` were given. ``kept`` is what the policy earned in the validation episodes, on average, as it was, and
    ``returns`` what it earned with the flow of this round at each strength; ``strength`` is the best of them, 0 if the
    policy was kept. Without episodes there are no returns, and ``kept`` is None.
    """

    labels: int
    strength: float
    kept: float | None
    returns: dict[float, float]

    @property
    def reached(self) -> float | None:
        """Return what the policy that was chosen earned in the validation episodes."""
        return self.returns.get(self.strength, self.kept)


@dataclass(frozen=True)
class Improvement:
    """Holds the policy after the last round, and the choice of each round.

    ``policy`` is a :class:`FlowPolicy` upon that of the round before, or the reference where no round was worth it.
    The returns are those by which was chosen, and flattered by that: measure the policy from other starts, with
    :func:`episode_returns`.
    """

    policy: Policy
    rounds: list[PolicyRound]

    def __str__(self) -> str:
        """Write a table, a line a round."""
        lines = [f"{'round':>5}  {'labels':>7}  {'strength':>8}  {'return before':>13}  {'and after':>9}"]
        for number, each in enumerate(self.rounds, 1):
            strength = f"{each.strength:g}" if each.strength else "none"
            before, after = ("–" if value is None else f"{value:.2f}" for value in (each.kept, each.reached))
            lines.append(f"{number:>5}  {each.labels:>7,}  {strength:>8}  {before:>13}  {after:>9}")
        return "\n".join(lines)


def improve(
    environment: Any,
    policy: Policy,
    pairs: int,
    *,
    rounds: int = 5,
    strengths: Sequence[float] = STRENGTHS,
    episodes: int = 16,
    form: str = "residual",
    config: FlowConfig | Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **collecting: Any,
) -> Improvement:
    """Refine a frozen policy in rounds of collecting, fitting a flow, and choosing how far to follow it.

    Choosing by returns is a search of its own, which rounds repeat: where almost any push helps, random answers lead
    to gains too (``docs/studies/control.md``). ``episodes=0`` follows labels alone. To learn what labels are
    worth in a simulator, improve with ``teacher=Teacher(mistake=0.5)`` as well.

    Args:
        environment: a gymnasium id, a batch environment, or a callable that makes one.
        policy: anything with stable-baselines3's ``predict``; it is never changed.
        pairs: comparisons in all; every round collects ``pairs // rounds``.
        rounds: at least 1.
        strengths: multiples of one pass to choose from, above 0. A round whose flow earns no more at any of them than
            the policy without it leaves the policy unchanged.
        episodes: whole ones, by whose mean return is chosen, from the same starts in every round; 0 runs none, and
            follows the flow of every round at the one strength that there is.
        form: of the segments, "residual" or "directions", see :meth:`SegmentPairs.encode`.
        config: of the flows, see :class:`pfm.FlowConfig`.
        folder: where rounds are kept as they end; the same call resumes there, and :func:`load_improvement` reads
            it. None keeps nothing.
        seed: of data and starts, independent in every round and for every seed; the fits have that of ``config``.
        progress: show progress bars.
        **collecting: ``length``, ``continuation`` and other settings of :func:`collect`. No ``value``: it would be of
            the policy that the rounds leave behind. ``noise`` must be a number: refined policies draw nothing.

    Raises:
        ValueError: an argument is out of range, or ``folder`` holds an improvement with other settings.
        TypeError: an argument that :func:`collect` does not take.
    """
    for name, count, least in (("rounds", rounds, 1), ("episodes", episodes, 0)):
        check_whole(name, count, least)
    check_whole("pairs", pairs, rounds, hint="each round needs a pair")
    check_choice("form", form, FORMS)
    if not strengths or not all(math.isfinite(each) and each > 0 for each in strengths):
        raise ValueError(f"strengths must be numbers above 0, at least one: got {list(strengths)}")
    if not episodes and len(strengths) > 1:
        raise ValueError(f"episodes=0 chooses nothing: give one strength, such as (1.0,), got {list(strengths)}")
    if collecting.get("value") is not None:
        raise ValueError("value is of one policy, and every round has another: give continuation, or call collect")
    if rounds > 1 and collecting.get("noise", 0.0) is None:
        raise ValueError(
            "noise=None draws the policy's own actions, and a refined policy draws none: give a number, as 0.3"
        )
    inspect.signature(collect).bind(environment, policy, pairs, **collecting)  # a misspelt setting is named now
    settings = config if isinstance(config, FlowConfig) else FlowConfig.from_dict(dict(config or {}))
    place = None if folder is None else Path(folder).expanduser()
    played, name = open_environment(environment)
    if place is not None:
        claim_folder(place, SETTINGS, {
            "environment": name, "policy": fingerprint(played, policy), "pairs": pairs, "rounds": rounds,
            "strengths": list(strengths), "episodes": episodes, "form": form, "seed": seed, "flow": settings.to_dict(),
            "collecting": {key: repr(value) for key, value in sorted(collecting.items()) if key != "workers"},
        }, "an improvement")  # fmt: skip

    def earned(candidate: Policy) -> float:
        return float(episode_returns(played, candidate, episodes, seed + VALIDATION, batch=episodes).mean())

    done: list[PolicyRound] = []
    standing, kept = policy, None
    # The first round is what collect does alone; seed + 1 would give the second the data of another seed's first.
    data_seeds = [seed, *episode_seeds(seed, rounds - 1, first=1)]
    for number, data_seed in enumerate(tqdm(data_seeds, desc="rounds", disable=not progress)):
        home = None if place is None else place / f"round-{number + 1}"
        if home is not None and (home / CHOSEN).is_file():
            standing, found = _read(home, standing)
        else:
            segments = collect(
                environment, standing, pairs // rounds, seed=data_seed, progress=progress,
                folder=None if home is None else home / SEGMENTS, **collecting,
            )  # fmt: skip
            flow = PreferenceFlow.fit(segments.encode(form), settings, progress=progress)
            choices = {strength: FlowPolicy(flow, standing, strength=strength) for strength in strengths}
            found = _choice(segments.labels, standing, choices, kept, earned if episodes else None)
            standing = choices.get(found.strength, standing)
            if home is not None:
                if found.strength:
                    flow.save_pretrained(home / FLOW)
                replace_json(home / CHOSEN, asdict(found))
        kept = found.reached
        done.append(found)
    return Improvement(standing, done)


def _choice(
    labels: int,
    standing: Policy,
    choices: Mapping[float, Policy],
    kept: float | None,
    earned: Callable[[Policy], float] | None,
) -> PolicyRound:
    """Take the strength that earns most, 0 if the standing policy does; without a measure, the only one."""
    if earned is None:
        return PolicyRound(labels, next(iter(choices)), None, {})
    kept = earned(standing) if kept is None else kept
    returns = {strength: earned(choice) for strength, choice in choices.items()}
    best = max(returns, key=lambda strength: returns[strength])
    return PolicyRound(labels, best if returns[best] > kept else 0.0, kept, returns)


def load_improvement(folder: str | Path, policy: Policy) -> Improvement:
    """Load what :func:`improve` kept in ``folder``, as far as it came, upon the policy that it began with.

    Raises:
        FileNotFoundError: there is no finished round.
    """
    place, rounds, standing = Path(folder).expanduser(), [], policy
    while (home := place / f"round-{len(rounds) + 1}").joinpath(CHOSEN).is_file():
        standing, found = _read(home, standing)
        rounds.append(found)
    if not rounds:
        raise FileNotFoundError(f"{place} holds no finished round: give a folder of pfm.pbrl.improve(..., folder=...)")
    return Improvement(standing, rounds)


def _read(home: Path, standing: Policy) -> tuple[Policy, PolicyRound]:
    """Read one round, and give its policy upon the one before."""
    found = json.loads((home / CHOSEN).read_text(encoding="utf-8"))
    found["returns"] = {float(strength): value for strength, value in found["returns"].items()}
    each = PolicyRound(**found)
    if not each.strength:
        return standing, each
    return FlowPolicy(PreferenceFlow.from_pretrained(home / FLOW), standing, strength=each.strength), each
