"""A frozen policy, refined: propose a segment of actions, carry it along the flow, execute its beginning, plan again.

Shapes: E episodes in a batch, O observation values, H steps of a segment, A action values.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import numpy as np
import torch

from pfm._internal.checks import check_choice, check_number, check_whole
from pfm._internal.significance import Confirmation, confirmed
from pfm.flow.preference_flow import PreferenceFlow
from pfm.pbrl.collection import open_environment
from pfm.pbrl.environments import STATELESS
from pfm.pbrl.fast import FastTransport
from pfm.pbrl.running import Continued, Memory, correlated_noise, run_on
from pfm.pbrl.segments import FORMS, SegmentPairs
from pfm.pbrl.states import pick_states

__all__ = ["FlowPolicy", "PolicyCounts", "RoundsChoice", "choose_rounds"]

MODES = ("single", "gated", "reapply", "relabel")
GUARDS = ("keep", "shrink", "off")
PROPOSALS = ("deterministic", "stochastic")
CHOICES = (1, 2, 3, 4, 6, 8)
BATCH = 32  # copies of a gymnasium environment that are stepped together


@dataclass
class PolicyCounts:
    """Counts what a policy did since it was made or ``reset``.

    ``plans`` segments were refined; of those ``off_support`` ended further from the proposals' distribution than the
    data did, ``not_better`` had a lower win probability than their proposals; ``kept`` are those whose proposal was
    executed in their place. ``clipped`` of ``actions`` were brought back to the bounds. ``moved`` is the sum of the
    distances between result and proposal, in root mean square units of the data's noise.
    """

    plans: int = 0
    off_support: int = 0
    not_better: int = 0
    kept: int = 0
    actions: int = 0
    clipped: int = 0
    moved: float = 0.0

    def reset(self) -> None:
        """Reset the counts."""
        self.__init__()


class FlowPolicy:
    """Acts like stable-baselines3's models: ``predict`` refines what a frozen policy proposes.

    A flow on residuals (:meth:`SegmentPairs.encode` with ``form="residual"``, or their ``"directions"``) is carried
    from the zero segment, which is the reference itself, and what it arrives at is added to the reference's action
    at each step: neither a simulator nor a cloned policy is needed. A flow on actions needs whole segments
    proposed: online by rolling the reference on a copy of the simulator, or offline by a policy that was cloned
    from data.

    Args:
        flow: fitted on pairs from :meth:`SegmentPairs.encode`.
        reference: the frozen policy; None for an offline ``proposal`` on actions.
        env: what the episodes are played in - an environment with exact state, a batch environment, or
            stable-baselines3's vector of such -; needed online by a flow on actions, and never stepped.
        proposal: ``"deterministic"`` (default), ``"stochastic"`` - draws of the distribution of the data -,
            or a policy with ``propose(observations, deterministic)``, such as :class:`ClonedPolicy`.
        mode, rounds, strength, guidance, win_gradient, steps: as for :meth:`pfm.PreferenceFlow.transport`; ``rounds=0``
            leaves the proposal. ``guidance=0`` goes the same way in every state. ``win_gradient`` is for flows on
            ``"directions"``: of the others the noise leaves most undecided, and so the slope of b.
        candidates: n proposals are carried for each plan, and the result of the largest win probability is executed:
            the proposal as above and n - 1 draws, as with ``"stochastic"``. Where held-out pairs did not confirm b,
            the first is executed. ``strength=0`` leaves n proposals to choose from: best of n.
        execute: h, how many steps of a refined segment are executed before the next plan; up to H.
        guard: treatment of a result that lies further from the proposals' distribution than 99% of the data, by its
            root mean square distance in units of the noise: ``"keep"`` executes the proposal, ``"shrink"`` brings the
            result back to that distance, ``"off"`` executes the result.
        win_guard: keep the proposal where the result's win probability is lower, if held-out pairs confirm b.
        seed: of stochastic proposals.

    Attributes:
        counts: what happened so far, see :class:`PolicyCounts`.

    Raises:
        ValueError: the flow was not fitted on action segments, or an argument is out of range.
        TypeError: ``reference`` has no ``predict``, or ``proposal`` no ``propose``.
    """

    def __init__(
        self,
        flow: PreferenceFlow,
        reference: Any,
        *,
        env: Any = None,
        proposal: Any = "deterministic",
        mode: str = "single",
        rounds: int | None = None,
        strength: float = 1.0,
        guidance: float = 1.0,
        win_gradient: float = 0.0,
        candidates: int = 1,
        execute: int = 1,
        guard: str = "off",
        win_guard: bool = False,
        steps: int | None = None,
        seed: int = 0,
    ) -> None:
        described = flow.metadata.get("encoder") or {}
        if described.get("kind") != "action segments":
            raise ValueError("flow was not fitted on action segments: fit it on SegmentPairs.encode()")
        self.flow = flow
        self.reference = reference
        self.form: str = described["form"]
        self.length: int = described["length"]
        self._basis = self._coordinates = None
        if self.form == "directions":  # residuals, of which the flow sees coordinates
            basis = np.asarray(described["basis"], dtype=np.float32)
            self.form, self._basis = "residual", basis.reshape(-1, basis.shape[-1]).T
            self._coordinates = np.linalg.pinv(self._basis)
        self._low = _bounds(described["low"], -math.inf)
        self._high = _bounds(described["high"], math.inf)
        self._unit = None if described.get("unit") is None else np.asarray(described["unit"], dtype=np.float32)
        self._radius = math.inf if described.get("radius") is None else float(described["radius"])
        self._correlation = float(described.get("correlation") or 0.0)
        if rounds is not None and rounds > 1 and mode == "single":
            raise ValueError(f"rounds={rounds} needs mode='reapply' or mode='relabel': got mode='single'")
        for name, value, known in (("mode", mode, MODES), ("guard", guard, GUARDS), ("form", self.form, FORMS)):
            check_choice(name, value, known)
        if isinstance(proposal, str):
            check_choice("proposal", proposal, PROPOSALS, hint="or give a policy")
        check_whole("execute", execute, 1, self.length, hint=f"the segments have {self.length} steps")
        check_whole("candidates", candidates, 1)
        if guard != "off" and math.isinf(self._radius):
            raise ValueError(f"guard={guard!r} needs to know how far the data lay from the proposals, and they carried "
                             "no plan: use guard='off'")  # fmt: skip
        offline = not isinstance(proposal, str)
        if self._unit is None and not offline and (proposal == "stochastic" or candidates > 1):
            raise ValueError("drawn proposals need the noise of the data, and they carried no plan: use "
                             "proposal='deterministic' and candidates=1")  # fmt: skip
        guidance = check_number("guidance", guidance, least=0)
        win_gradient = check_number("win_gradient", win_gradient)
        if guidance != 1 and flow.context_free is None:
            raise ValueError(f"guidance={guidance!r} needs a field without states: fit the flow with "
                             "FlowConfig(context_free=True), or use guidance=1")  # fmt: skip
        if offline and not callable(getattr(proposal, "propose", None)):
            raise TypeError(f"proposal must have propose(observations, deterministic): got {type(proposal).__name__}")
        if not (offline and self.form == "actions") and not callable(getattr(reference, "predict", None)):
            raise TypeError(f"reference must have stable-baselines3's predict: got {type(reference).__name__}")
        if self.form == "residual" and offline:
            raise ValueError("a flow on residuals starts from the reference: give a cloned policy as reference")
        if self.form == "actions" and not offline and env is None:
            raise ValueError(
                "a flow on actions needs whole segments proposed: give env to roll the reference on a copy of it, "
                "a cloned policy as proposal, or fit on encode(form='residual')"
            )
        space = getattr(reference, "action_space", None)
        if space is not None and (space.shape != self._low.shape or not np.allclose(space.low, self._low)
                                  or not np.allclose(space.high, self._high)):  # fmt: skip
            raise ValueError(
                f"the reference acts in {space} and the flow was fitted on actions {self._low.shape} from "
                f"{self._low.tolist()} to {self._high.tolist()}: take the policy that the segments were "
                "collected with, in the same environment: a wrapper such as RescaleAction changes the bounds"
            )
        self.proposal = proposal
        self.mode, self.rounds, self.strength, self.steps = mode, rounds, float(strength), steps
        self.guidance, self.win_gradient = float(guidance), float(win_gradient)
        self.candidates, self.execute = candidates, execute
        self.guard, self.win_guard = guard, win_guard
        self.counts = PolicyCounts()
        self._random = np.random.default_rng(seed)
        self._env, self._simulator = env, None
        self._fast = FastTransport.of(flow)

    def seed(self, seed: int) -> None:
        """Reset the draws of stochastic proposals."""
        self._random = np.random.default_rng(seed)

    def bind(self, env: Any) -> FlowPolicy:
        """Copy, to be played in another environment."""
        twin = copy.copy(self)
        twin._env, twin._simulator, twin.counts = env, None, PolicyCounts()
        return twin

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Choose actions, as stable-baselines3's ``predict`` does.

        Args:
            observation: (O,) or (E, O).
            state: what the call before returned, None at first; it holds what is left of the segments in execution.
            episode_start: (E,) or bool: which episodes begin now.
            deterministic: without effect: what is proposed is decided by ``proposal``.

        Returns:
            actions (A,) or (E, A) within the bounds, and the state for the next call.

        Raises:
            ValueError: the observation has another size than the flow's context, or is not finite; online, the
                environment stands at another observation.
        """
        seen = np.asarray(observation)
        rows = np.atleast_2d(seen)
        if rows.ndim != 2 or rows.shape[1] != self.flow.context_dimension:
            raise ValueError(
                f"observation must be ({self.flow.context_dimension},) or (E, {self.flow.context_dimension}): "
                f"got {seen.shape}"
            )
        if not np.isfinite(rows).all():
            raise ValueError("observation holds NaN or infinity: the environment broke, or was given such actions")
        count = len(rows)
        segment, place, memory = self._recall(state, episode_start, count)
        base = None
        if self.form == "residual":
            started = np.full(count, state is None) if episode_start is None else np.broadcast_to(episode_start, count)
            base, memory = self.reference.predict(rows, memory, started, deterministic=True)
            base = np.asarray(base)
            if base.shape != (count, len(self._low)):
                raise ValueError(f"the reference gives actions {base.shape}, the flow has ({count}, {len(self._low)})")
        due = np.flatnonzero(place >= self.execute)
        if len(due):
            segment[due] = self._planned(rows, due)
            place[due] = 0
        action = segment[np.arange(count), place]
        if base is not None:
            action = np.clip(base, self._low, self._high) + action
        bounded = np.clip(action, self._low, self._high)
        self.counts.actions += count
        self.counts.clipped += int((bounded != action).any(1).sum())
        kept: Any = memory
        if self.execute > 1:
            kept = (segment, place + 1, *(memory or ()))
        bounded = bounded.astype(np.float32)
        return (bounded if seen.ndim == 2 else bounded[0]), kept

    def _planned(self, observation: np.ndarray, due: np.ndarray) -> np.ndarray:
        """Return the segments (B, H, A) to execute next in the rows that are due."""
        first = self._propose(observation, due, self.proposal == "stochastic")
        if self.candidates == 1 or not math.isfinite(
            self.flow.guard_margin
        ):  # nothing to choose, or b has no information
            return self.refine(first, observation[due])
        drawn = [self._propose(observation, due, True) for _ in range(self.candidates - 1)]
        seen = np.tile(observation[due], (self.candidates, 1))
        carried = self.refine(np.concatenate([first, *drawn]), seen)
        wins = self._win_probability(carried, seen).reshape(self.candidates, len(due))
        return carried.reshape(self.candidates, *first.shape)[wins.argmax(0), np.arange(len(due))]

    def refine(self, proposed: np.ndarray, observation: np.ndarray) -> np.ndarray:
        """Carry proposed segments (B, H, A) along the flow, under observations (B, O), and guard the results."""
        if self.rounds == 0 or self.strength == 0:
            return proposed
        result = self._carried(proposed, observation)
        if self.form == "actions":
            result = np.clip(result, self._low, self._high)
        self.counts.plans += len(result)
        return self._guarded(proposed.astype(np.float32), result, observation)

    def _carried(self, proposed: np.ndarray, observation: np.ndarray) -> np.ndarray:
        if self._basis is None:
            return self._transported(proposed, observation)
        start = self._seen_by_flow(proposed)
        moved = (self._transported(start, observation) - start) @ self._basis
        return proposed.astype(np.float32) + moved.reshape(proposed.shape)

    def _transported(self, start: np.ndarray, observation: np.ndarray) -> np.ndarray:
        """Carry what the flow was fitted on, segments or coordinates of them."""
        again = self.mode in ("single", "reapply")
        if again and self._fast is not None and not self.win_gradient:
            result = self._fast(
                start.reshape(len(start), -1), observation, rounds=self.rounds or 1, strength=self.strength,
                steps=self.steps, guidance=self.guidance,
            )  # fmt: skip
            if np.isfinite(result).all():
                return result.reshape(start.shape)
        carried = self.flow.transport(
            np.asarray(start, dtype=np.float32), np.asarray(observation, dtype=np.float32), mode=self.mode,
            rounds=self.rounds if self.mode in ("reapply", "relabel") else None, strength=self.strength,
            steps=self.steps, guidance=self.guidance, win_gradient=self.win_gradient,
        )  # fmt: skip
        return carried.numpy()

    def _seen_by_flow(self, segments: np.ndarray) -> np.ndarray:
        """Return segments (B, H, A) as the flow was fitted on them: themselves, or their coordinates (B, K)."""
        segments = np.asarray(segments, dtype=np.float32)
        return segments if self._coordinates is None else segments.reshape(len(segments), -1) @ self._coordinates

    def _win_probability(self, segments: np.ndarray, observation: np.ndarray) -> np.ndarray:
        seen = np.asarray(observation, dtype=np.float32)
        return self.flow.win_probability(self._seen_by_flow(segments), seen).numpy()

    def _guarded(self, proposed: np.ndarray, result: np.ndarray, observation: np.ndarray) -> np.ndarray:
        if self._unit is not None:
            centre = 0.0 if self.form == "residual" else proposed
            distance = np.sqrt(np.square((result - centre) / self._unit).mean((1, 2)))
            far = distance > self._radius
            self.counts.moved += float(np.sqrt(np.square((result - proposed) / self._unit).mean((1, 2))).sum())
            self.counts.off_support += int(far.sum())
            if self.guard == "shrink" and far.any():
                share = np.where(far, self._radius / np.maximum(distance, 1e-12), 1.0)[:, None, None]
                result = (centre + share * (result - centre)).astype(np.float32)
            elif self.guard == "keep" and far.any():
                result = np.where(far[:, None, None], proposed, result)
                self.counts.kept += int(far.sum())
        if self.win_guard and math.isfinite(self.flow.guard_margin):
            before, after = (self._win_probability(y, observation) for y in (proposed, result))
            worse = after < before
            self.counts.not_better += int(worse.sum())
            self.counts.kept += int(worse.sum())
            result = np.where(worse[:, None, None], proposed, result)
        return result

    def _recall(self, state: Any, episode_start: Any, count: int) -> tuple[np.ndarray, np.ndarray, Memory]:
        """Take the state apart: segments (E, H, A), the next step of each (E,), the reference's own state."""
        segment = np.zeros((count, self.length, len(self._low)), dtype=np.float32)
        place = np.full(count, self.execute)
        if state is None:
            return segment, place, None
        if self.execute == 1:
            return segment, place, state
        segment, place, *memory = state
        if len(segment) != count:
            raise ValueError(f"state is of {len(segment)} episodes, and there are {count} observations")
        segment, place = segment.copy(), place.copy()
        if episode_start is not None:
            place[np.broadcast_to(episode_start, count)] = self.execute
        return segment, place, tuple(memory) or None

    # -- proposals ----------------------------------------------------------------------------------------------

    def _propose(self, observation: np.ndarray, due: np.ndarray, drawn: bool) -> np.ndarray:
        """Propose segments (B, H, A) for the rows that are due: the policy's own, or drawn ones."""
        if not isinstance(self.proposal, str):
            return np.asarray(self.proposal.propose(observation[due], not drawn), dtype=np.float32)
        added = self._noise(len(due)) if drawn else self._unchanged(len(due))
        if self.form == "residual":
            return added
        states = pick_states(_states_of(self._env, len(observation)), due)
        if self._simulator is None:
            self._simulator = _copy_of(self._env)
        stands = self._simulator.restore_states(states)
        if not np.allclose(stands, observation[due], rtol=1e-4, atol=1e-5):
            raise ValueError(
                "the environment stands at another observation than the one given: env must be the very environment "
                "that is played, without wrappers that change observations outside of it"
            )
        return run_on(self._simulator, self.reference, states, added, 0).actions.astype(np.float32)

    def _unchanged(self, count: int) -> np.ndarray:
        """Return residuals (count, H, A) that add nothing."""
        return np.zeros((count, self.length, len(self._low)), dtype=np.float32)

    def _noise(self, count: int) -> np.ndarray:
        assert self._unit is not None
        noise = correlated_noise(self._random, (count, *self._unit.shape), 1.0, self._correlation)
        return (noise * self._unit).astype(np.float32)


def _bounds(values: list[float | None], otherwise: float) -> np.ndarray:
    return np.array([otherwise if value is None else value for value in values], dtype=np.float32)


def _states_of(env: Any, count: int) -> Any:
    """Save the states of a batch environment, of one environment, or of stable-baselines3's vector of them."""
    if hasattr(env, "save_states"):
        states = env.save_states()
    elif hasattr(env, "envs"):
        states = [_saver(each)() for each in env.envs]
    else:
        states = [_saver(env)()]
    if len(states) != count:
        raise ValueError(
            f"env has {len(states)} episodes and there are {count} observations: give the one that is played"
        )
    return states


def _saver(env: Any) -> Any:
    if hasattr(env, "get_wrapper_attr"):
        try:
            return env.get_wrapper_attr("save_state")
        except AttributeError:
            pass
    raise TypeError(f"{env} has no exact state: make it with pfm.pbrl.make_env")


def _copy_of(env: Any) -> Any:
    """Make a batch environment of the same kind, to roll proposals on."""
    from pfm.pbrl.rollouts import VectorEnv

    if isinstance(env, VectorEnv):
        return VectorEnv(env.source, **env.settings)
    if hasattr(env, "save_states"):
        return type(env)()
    one = env.envs[0] if hasattr(env, "envs") else env
    spec = one.spec
    kept = {kind.__name__ for kind in STATELESS}
    if outer := [wrapper for wrapper in spec.additional_wrappers if wrapper.name in kept]:
        whole = replace(spec, additional_wrappers=tuple(outer))
        return VectorEnv(lambda: gymnasium.make(whole, render_mode=None))
    settings = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    return VectorEnv(spec.id, **settings)


# -- held-out choice ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundsChoice:
    """Holds the setting that did best on held-out states.

    ``rounds`` and ``strength`` are the choice, ``rounds`` 0 if nothing beat the proposals beyond doubt; ``gain`` is
    its mean gain over the proposals - in reward, or in win probability for ``by="win"`` -, ``z`` the same in standard
    errors over trajectories. ``table`` has one row a candidate; ``steps`` of the simulator were taken.
    """

    rounds: int
    strength: float
    gain: float
    z: float
    by: str
    steps: int = 0
    table: list[dict[str, Any]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the arguments for :class:`FlowPolicy`."""
        return {"mode": "reapply", "rounds": self.rounds, "strength": self.strength}


def choose_rounds(
    policy: FlowPolicy,
    held_out: SegmentPairs,
    *,
    by: str = "value",
    env: Any = None,
    rounds: tuple[int, ...] = CHOICES,
    strengths: tuple[float, ...] = (1.0,),
    continuation: int | None = None,
    value: Any = None,
) -> RoundsChoice:
    """Choose how often and how strongly to apply a flow, on held-out states.

    Args:
        policy: whose flow, reference and guard are used; it is not changed.
        held_out: segments of other trajectories than the flow was fitted on, with their plans.
        by: ``"value"`` runs refined segments in the simulator and takes their return with what follows; ``"win"``
            uses the flow's own win probability, without a simulator: it is fitted on the data's support only.
        env: for ``by="value"``: a gymnasium id, a batch environment or what makes one.
        rounds, strengths: the candidates.
        continuation: steps of the reference after a segment; None for those of the segments' collection.
        value: what is expected after the continuation, as in :func:`collect`.

    Returns:
        the candidate of the largest gain, if the gain is beyond doubt on these states, else ``rounds=0``.

    Raises:
        ValueError: the choice needs a simulator, states or plans that are not there.
    """
    check_choice("by", by, ("value", "win"))
    observation = held_out.observation
    if policy.form == "residual":
        start = policy._unchanged(len(held_out))
    elif not isinstance(policy.proposal, str):
        start = np.asarray(policy.proposal.propose(observation, True), dtype=np.float32)
    elif held_out.plan is not None:
        start = held_out.plan
    else:
        raise ValueError("held_out carries no plan, the reference's own segment: collect it with pfm.pbrl.collect")
    made, taken = None, 0
    if by == "value":
        if env is None or held_out.states is None:
            raise ValueError("by='value' needs env and the segments' states: give both, or use by='win'")
        made = open_environment(env)[0]
        after = int(held_out.meta.get("continuation", 0)) if continuation is None else continuation
    group = torch.from_numpy(held_out.trajectory.astype(np.int64))

    def judge(segments: np.ndarray) -> np.ndarray:
        nonlocal taken
        if made is None:
            return policy._win_probability(segments, observation)
        ran = _run_all(made, policy, held_out, segments, after, value)
        taken += ran.simulated
        return ran.rewards @ held_out.discount ** np.arange(held_out.length) + ran.after

    plain = judge(start)
    table: list[dict[str, Any]] = []
    confirmations: list[Confirmation] = []
    for count in rounds:
        for strength in strengths:
            twin = copy.copy(policy)
            twin.mode, twin.rounds, twin.strength, twin.counts = "reapply", count, strength, PolicyCounts()
            gain = judge(twin.refine(start, observation)) - plain
            # The largest of several gains is tested as the best of as many tests.
            found = confirmed(torch.from_numpy(gain), group, tests=len(rounds) * len(strengths))
            table.append(
                {"rounds": count, "strength": strength, "gain": float(gain.mean()), "z": found.z,
                 "off_support": twin.counts.off_support / len(start)}
            )  # fmt: skip
            confirmations.append(found)
    best, found = max(zip(table, confirmations, strict=True), key=lambda row: row[0]["gain"])
    if not found:
        return RoundsChoice(0, 1.0, 0.0, best["z"], by, taken, table)
    return RoundsChoice(best["rounds"], best["strength"], best["gain"], best["z"], by, taken, table)


def _run_all(env: Any, policy: FlowPolicy, held_out: SegmentPairs, segments: np.ndarray, continuation: int,
             value: Any) -> Continued:  # fmt: skip
    states = held_out.saved_states()
    chunk = 4096 if isinstance(states, np.ndarray) else BATCH
    pieces = []
    for begin in range(0, len(held_out), chunk):
        rows = np.arange(begin, min(begin + chunk, len(held_out)))
        memory = None if held_out.memory is None else tuple(part[rows] for part in held_out.memory)
        pieces.append(
            run_on(
                env, policy.reference, pick_states(states, rows), segments[rows], continuation, form=policy.form,
                memory=memory, discount=held_out.discount, value=value,
            )
        )  # fmt: skip
    return Continued.concatenate(pieces)
