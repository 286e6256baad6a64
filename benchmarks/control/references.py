"""The frozen policies that are refined: pretrained actors, and some trained here: nobody published one, or a weak one.

What is trained is kept as an actor's layers (:class:`pfm.pbrl.ActorPolicy`), with its recipe in ``meta``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core.data import data_folder
from pfm._internal.files import replace_file
from pfm.pbrl import ActorPolicy, load_policy

__all__ = ["RECIPES", "Recipe", "load_reference", "normalised_score"]


@dataclass(frozen=True)
class Recipe:
    """Says how a reference is trained: stable-baselines3's defaults with two layers of 64, stopped early.

    ``algorithm`` "A2C", "PPO" or "SAC", ``steps`` of the environment, ``copies`` of it side by side, ``seed``.
    """

    environment: str
    algorithm: str
    steps: int
    copies: int = 8
    seed: int = 0


RECIPES = {
    "a2c_Reacher-v5": Recipe("Reacher-v5", "A2C", 28_000),
    "sac_Pendulum-v1_early": Recipe("Pendulum-v1", "SAC", 7_000, copies=1),
    "ppo_HalfCheetah-v4_early": Recipe("HalfCheetah-v4", "PPO", 40_960, copies=1),
    "ppo_Hopper-v4_early": Recipe("Hopper-v4", "PPO", 20_480, copies=1),
    "ppo_LunarLanderContinuous-v3_early": Recipe("LunarLanderContinuous-v3", "PPO", 20_480, copies=1),
}


def load_reference(name: str, folder: Path) -> ActorPolicy:
    """Load a pretrained actor by the name of its file, or train one of :data:`RECIPES`, once below ``folder``.

    Raises:
        MissingDataError: the pretrained actors are absent.
        ValueError: there is neither such a file nor such a recipe.
    """
    if name in RECIPES:
        path = folder / "policies" / f"{name}.npz"
        if not path.is_file():
            _train(RECIPES[name], path)
    else:
        path = data_folder("rl_policies") / f"{name}.npz"
        if not path.is_file():
            raise ValueError(f"reference={name!r} is neither a file {path} nor one of {', '.join(RECIPES)}")
    policy = load_policy(path)
    assert isinstance(policy, ActorPolicy)
    return policy


def normalised_score(value: float, name: str) -> float:
    """Return 100 (value - random) / (expert - random) by D4RL's reference returns (Fu et al., 2004.07219)."""
    scores = json.loads((data_folder("rl_policies") / "d4rl_reference_scores.json").read_text(encoding="utf-8"))[name]
    return 100 * (value - scores["ref_min"]) / (scores["ref_max"] - scores["ref_min"])


def _train(recipe: Recipe, path: Path) -> None:
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env

    make: Any = getattr(stable_baselines3, recipe.algorithm)
    model = make(
        "MlpPolicy", make_vec_env(recipe.environment, n_envs=recipe.copies, seed=recipe.seed), seed=recipe.seed,
        device="cpu", policy_kwargs={"net_arch": [64, 64]},
    ).learn(recipe.steps)  # fmt: skip
    policy = model.policy
    if recipe.algorithm == "SAC":
        body, last, activation, output = policy.actor.latent_pi, policy.actor.mu, "relu", "tanh"
        arrays = {"logstd_W": policy.actor.log_std.weight, "logstd_b": policy.actor.log_std.bias}
    else:
        body, last, activation, output = policy.mlp_extractor.policy_net, policy.action_net, "tanh", "clip"
        arrays = {"log_std": policy.log_std}
    layers = [*(layer for layer in body if hasattr(layer, "weight")), last]
    for number, layer in enumerate(layers):
        arrays |= {f"W{number}": layer.weight, f"b{number}": layer.bias}
    meta = {
        "algo": recipe.algorithm.lower(), "env": recipe.environment, "hidden_activation": activation,
        "output": output, "n_layers": len(layers), "normalised_obs": False, "time_feature": False,
        "recipe": asdict(recipe) | {"stable_baselines3": stable_baselines3.__version__},
    }  # fmt: skip
    values: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **values)

    replace_file(path, write)
