"""Preference-based control: frozen policies, refined by a flow over segments of their actions.

Names are imported when they are first used, so that ``import pfm`` does not wait for gymnasium or a simulator.
What needs them is installed by ``pip install "preference-flow[pbrl]"``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfm.pbrl.arrays import BatchedPendulum, BatchedPointMass
    from pfm.pbrl.collection import collect
    from pfm.pbrl.environments import (
        StatefulEnv,
        StateMismatchError,
        UnsupportedEnvironmentError,
        make_env,
        stack_states,
        unstack_states,
    )
    from pfm.pbrl.flow_policy import FlowPolicy, PolicyCounts, RoundsChoice, choose_rounds
    from pfm.pbrl.human import HumanSegments, PeopleReward
    from pfm.pbrl.improvement import Improvement, PolicyRound, improve, load_improvement
    from pfm.pbrl.policies import (
        ActorPolicy,
        ClonedPolicy,
        NoisyPolicy,
        NormalizedPolicy,
        ObservationStatistics,
        Policy,
        check_policy,
        load_policy,
        seed_policy,
    )
    from pfm.pbrl.rollouts import (
        BatchEnv,
        Rollout,
        VectorEnv,
        episode_returns,
        episode_seeds,
        play,
        rollout,
    )
    from pfm.pbrl.segments import SegmentPairs, SegmentStatistics
    from pfm.pbrl.teachers import TEACHERS, Teacher
    from pfm.pbrl.values import FittedValue

_HOME = {
    "TEACHERS": "teachers",
    "ActorPolicy": "policies",
    "BatchEnv": "rollouts",
    "BatchedPendulum": "arrays",
    "BatchedPointMass": "arrays",
    "ClonedPolicy": "policies",
    "FittedValue": "values",
    "FlowPolicy": "flow_policy",
    "HumanSegments": "human",
    "Improvement": "improvement",
    "NoisyPolicy": "policies",
    "NormalizedPolicy": "normalization",
    "ObservationStatistics": "normalization",
    "PeopleReward": "human",
    "Policy": "policies",
    "PolicyCounts": "flow_policy",
    "PolicyRound": "improvement",
    "Rollout": "rollouts",
    "RoundsChoice": "flow_policy",
    "SegmentPairs": "segments",
    "SegmentStatistics": "segments",
    "StateMismatchError": "environments",
    "StatefulEnv": "environments",
    "Teacher": "teachers",
    "UnsupportedEnvironmentError": "environments",
    "VectorEnv": "rollouts",
    "check_policy": "policies",
    "choose_rounds": "flow_policy",
    "collect": "collection",
    "episode_returns": "rollouts",
    "episode_seeds": "rollouts",
    "improve": "improvement",
    "load_improvement": "improvement",
    "load_policy": "policies",
    "make_env": "environments",
    "play": "rollouts",
    "rollout": "rollouts",
    "seed_policy": "policies",
    "stack_states": "environments",
    "unstack_states": "environments",
}

__all__ = [
    "TEACHERS",
    "ActorPolicy",
    "BatchEnv",
    "BatchedPendulum",
    "BatchedPointMass",
    "ClonedPolicy",
    "FittedValue",
    "FlowPolicy",
    "HumanSegments",
    "Improvement",
    "NoisyPolicy",
    "NormalizedPolicy",
    "ObservationStatistics",
    "PeopleReward",
    "Policy",
    "PolicyCounts",
    "PolicyRound",
    "Rollout",
    "RoundsChoice",
    "SegmentPairs",
    "SegmentStatistics",
    "StateMismatchError",
    "StatefulEnv",
    "Teacher",
    "UnsupportedEnvironmentError",
    "VectorEnv",
    "check_policy",
    "choose_rounds",
    "collect",
    "episode_returns",
    "episode_seeds",
    "improve",
    "load_improvement",
    "load_policy",
    "make_env",
    "play",
    "rollout",
    "seed_policy",
    "stack_states",
    "unstack_states",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        try:
            return getattr(import_module(f"pfm.pbrl.{_HOME[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name != "gymnasium":
                raise
            raise ImportError(f'pfm.pbrl.{name} needs gymnasium: pip install "preference-flow[pbrl]"') from error
    raise AttributeError(f"module 'pfm.pbrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
