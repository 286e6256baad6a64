"""The value of a frozen policy: what it still earns from where it stands, fitted on its own rollouts.

A teacher who knows it need not watch the reference go on: a segment is worth its discounted return and
gamma**h V(s_h), at a fraction of the simulator's steps. V is fitted by least squares on Monte-Carlo returns (Sutton and
Barto, Reinforcement Learning, 2nd edition, section 9.3) from states that segments end in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfm._internal.archive import load_module
from pfm._internal.checks import check_number, check_whole
from pfm._internal.networks import Perceptron, train_epochs
from pfm.pbrl.collection import SHARD, open_environment, visit
from pfm.pbrl.networks import load_network, save_network
from pfm.pbrl.running import check_observation, clip_action, correlated_noise, half_range

__all__ = ["FittedValue", "monte_carlo_returns"]

TAIL = 0.01  # share of a return's weight that may lie beyond the end of a rollout
KIND = "pfm.pbrl.FittedValue"


class FittedValue:
    """V(s) of a deterministic policy without a time limit, a network of the observation; made by :meth:`fit`.

    Attributes:
        discount: gamma, in (0, 1), of rewards a step.
        r2: 1 - squared error / variance of the returns of held-out trajectories.
        rows: how many returns it was fitted on.
        simulated: steps of the simulator that they cost.
    """

    def __init__(self, size: int, discount: float, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> None:
        self.discount = discount
        self.r2 = math.nan
        self.rows = self.simulated = 0
        self.shape = {"size": size, "hidden": hidden, "layers": layers}
        # centre and scale of the observations, and of the returns
        self.mean, self.scale = torch.zeros(size), torch.ones(size)
        self.centre, self.unit = torch.zeros(()), torch.ones(())
        self.network = Perceptron(size, hidden, 1, layers=layers, seed=seed)

    @classmethod
    def fit(
        cls,
        environment: Any,
        policy: Any,
        *,
        discount: float,
        length: int = 5,
        states: int = 300,
        steps: int = 50,
        noise: float = 0.3,
        correlation: float = 0.0,
        explore: float | None = None,
        states_per_trajectory: int = 5,
        batch: int = 32,
        hidden: int = 64,
        layers: int = 2,
        epochs: int = 60,
        held_out: float = 0.2,
        seed: int = 0,
    ) -> FittedValue:
        """Run the policy on from the ends of noisy segments, and fit what it earns there.

        States are taken as :func:`pfm.pbrl.collect` takes them, a noisy segment is run from each, and then the
        deterministic policy. The time limit is put off, so that returns are those of a task that goes on; a rollout
        that is cut gives the returns of its first ``steps`` states, of which less than a hundredth lies beyond the cut.

        Args:
            environment: a gymnasium id, a batch environment, or what makes one; it needs ``restart_clock``.
            policy: the frozen reference.
            discount: gamma, in (0, 1); that of the collection in which the value is used.
            length, noise, correlation, explore, states_per_trajectory: of the segments and the states before them, as
                in :func:`pfm.pbrl.collect`.
            states: how many segments. steps: how many states after each are fitted.
            batch: copies of a gymnasium environment that are stepped together.
            hidden, layers: width and number of hidden layers. epochs: passes over the returns, at most.
            held_out: share of the trajectories that are kept out, half to say when to stop and half for ``r2``.
            seed: of the states, the noise, the split and the network.

        Raises:
            ValueError: an argument is out of range, the policy acts in another space, or the value explains nothing of
                the held-out returns (``r2`` <= 0).
            TypeError: the environment cannot put off its time limit.
        """
        _check(discount, length, states, steps, noise, correlation, explore, states_per_trajectory, batch, held_out)
        env, _ = open_environment(environment)
        if not hasattr(env, "restart_clock"):
            raise TypeError(
                f"{type(env).__name__} cannot put off its time limit, which a value needs: give it restart_clock()"
            )
        random = np.random.default_rng([seed, 0])
        seen, returns, trajectory, simulated = _gather(
            env, policy, random, discount=discount, length=length, states=states, steps=steps, noise=noise,
            correlation=correlation, explore=noise if explore is None else explore, per=states_per_trajectory,
            batch=batch,
        )  # fmt: skip
        value = cls(seen.shape[1], discount, hidden=hidden, layers=layers, seed=seed)
        value.simulated = simulated
        value._learn(seen, returns, trajectory, held_out, epochs, seed)
        return value

    @torch.no_grad()
    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Return V (B,) float64 of observations (B, O).

        Raises:
            ValueError: observations of another shape.
        """
        rows = np.asarray(observation)
        if rows.ndim != 2 or rows.shape[1] != self.shape["size"]:
            raise ValueError(f"observation must be (B, {self.shape['size']}), as in the fit: got {rows.shape}")
        return self._estimate(torch.as_tensor(rows, dtype=torch.float32)).double().numpy()

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, and return its path: weights, and what was measured as its metadata."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        config = self.shape | {
            "discount": self.discount, "r2": self.r2, "rows": self.rows, "simulated": self.simulated,
        }  # fmt: skip
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {"mean": self.mean, "scale": self.scale, "centre": self.centre, "unit": self.unit}
        return save_network(path, KIND, config, tensors)

    @classmethod
    def load(cls, path: str | Path) -> FittedValue:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it holds something else.
        """
        sizes = {"hidden": "hidden", "layers": "layers", "inputs": "size"}
        config, tensors = load_network(path, KIND, list(sizes.values()))
        shape = {name: config[key] for name, key in sizes.items()}
        network = load_module(
            lambda: Perceptron(outputs=1, seed=0, **shape), Path(path), "configuration", prefix="network."
        )
        try:
            value = cls(config["size"], config["discount"], hidden=config["hidden"], layers=config["layers"])
            value.r2, value.rows, value.simulated = config["r2"], config["rows"], config["simulated"]
            value.mean, value.scale = tensors["mean"], tensors["scale"]
            value.centre, value.unit = tensors["centre"], tensors["unit"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: its configuration is damaged ({error!r}): save it again") from error
        value.network.load_state_dict(network.state_dict())
        return value

    def _estimate(self, rows: Tensor) -> Tensor:
        return self.network((rows - self.mean) / self.scale)[:, 0] * self.unit + self.centre

    def _learn(
        self, seen: np.ndarray, returns: np.ndarray, trajectory: np.ndarray, held_out: float, epochs: int, seed: int
    ) -> None:
        """Fit returns (R,) at observations (R, O); stop by some held-out trajectories, and judge by others."""
        names = np.random.default_rng([seed, 1]).permutation(np.unique(trajectory))
        each = max(round(held_out * len(names) / 2), 1)
        if len(names) < 3 * each:
            raise ValueError(f"{len(names)} trajectories are too few to hold some out: more states, or fewer of each")
        parts = [np.isin(trajectory, part) for part in (names[2 * each :], names[:each], names[each : 2 * each])]
        (x, y), (x_stop, y_stop), (x_held, y_held) = (
            (torch.as_tensor(seen[part], dtype=torch.float32), torch.as_tensor(returns[part], dtype=torch.float32))
            for part in parts
        )
        self.rows = len(x)
        spread, unit = x.std(0), y.std()
        self.mean, self.scale = x.mean(0), torch.where(spread > 1e-6, spread, torch.ones_like(spread))
        self.centre, self.unit = y.mean(), unit if unit > 0 else torch.ones(())
        generator = torch.Generator().manual_seed(seed)

        def training_loss(rows: Tensor) -> Tensor:
            return ((self._estimate(x[rows]) - y[rows]) / self.unit).square().mean()

        train_epochs(
            self.network, training_loss, lambda: (self._estimate(x_stop) - y_stop).square().mean(),
            torch.arange(len(x)), generator, epochs=epochs, batch_size=256, learning_rate=3e-3,
        )  # fmt: skip
        with torch.no_grad():
            left = (self._estimate(x_held) - y_held).square().mean() / y_held.var(correction=0).clamp_min(1e-30)
        self.r2 = 1 - float(left)
        if not self.r2 > 0:
            raise ValueError(
                f"the value explains nothing of the returns on held-out trajectories (R² = {self.r2:.3g}): more "
                "states, a smaller discount, or steps of the reference (continuation) in its place"
            )


def monte_carlo_returns(rewards: np.ndarray, discount: float) -> np.ndarray:
    """Return the discounted return from each step on, (T, E), of rewards (T, E) that are 0 after an episode's end."""
    returns = np.zeros_like(rewards, dtype=np.float64)
    following = np.zeros(rewards.shape[1])
    for step in range(len(rewards) - 1, -1, -1):
        returns[step] = following = rewards[step] + discount * following
    return returns


def _gather(
    env: Any,
    policy: Any,
    random: np.random.Generator,
    *,
    discount: float,
    length: int,
    states: int,
    steps: int,
    noise: float,
    correlation: float,
    explore: float,
    per: int,
    batch: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Roll out; give observations (R, O), returns (R,), the trajectory of each (R,), and how many steps it took."""
    from pfm.pbrl.policies import seed_policy

    seed_policy(policy, int(random.integers(2**31)))
    beyond = math.ceil(math.log(TAIL) / math.log(discount))
    spread = half_range(env.action_space)
    observations, returns, trajectories, simulated = [], [], [], 0
    for number in range(math.ceil(states / SHARD)):
        visited, walked = visit(
            env, policy, random, per=per, explore=explore, correlation=correlation, deterministic=True, number=number
        )
        simulated += walked
        count = min(SHARD, states - SHARD * number)
        chunk = count if isinstance(visited.states, np.ndarray) else batch
        for begin in range(0, count, chunk):
            at = visited.pick(np.arange(begin, min(begin + chunk, count)))
            width = len(at.trajectory)
            added = spread * correlated_noise(random, (width, length, spread.size), noise, correlation)
            observation, memory, start = env.restore_states(at.states), at.memory, np.full(width, at.memory is None)
            alive = np.ones(width, dtype=bool)
            seen, rewards, lived = [], [], []
            for step in range(length + steps + beyond):
                if not alive.any():
                    break
                env.restart_clock()
                action, memory = policy.predict(observation, memory, start, True)
                start = np.zeros(width, dtype=bool)
                action = clip_action(action, env)
                if step < length:
                    action = clip_action(action + added[:, step], env)
                else:
                    seen.append(observation)
                    lived.append(alive)
                simulated += int(alive.sum())
                observation, reward, done = env.step(action.astype(env.action_space.dtype))
                if step >= length:
                    rewards.append(np.where(alive, reward, 0.0))
                alive = alive & ~done
                check_observation(observation, alive, f"step {step + 1} of a rollout for the value")
            if not seen:
                continue
            known = np.stack(lived)
            known[:, alive] &= np.arange(len(known))[:, None] < steps  # those that were cut
            observations.append(np.stack(seen)[known])
            returns.append(monte_carlo_returns(np.stack(rewards), discount)[known])
            trajectories.append(np.broadcast_to(at.trajectory, known.shape)[known])
    if not observations:
        raise ValueError("every episode ended within its noisy segment: less noise, or shorter segments")
    return np.concatenate(observations), np.concatenate(returns), np.concatenate(trajectories), simulated


def _check(discount: float, length: int, states: int, steps: int, noise: float, correlation: float,
           explore: float | None, per: int, batch: int, held_out: float) -> None:  # fmt: skip
    hint = "without a time limit a return is finite for these only"
    check_number("discount", discount, above=0, below=1, hint=hint)
    for name, number in (("length", length), ("states", states), ("steps", steps), ("batch", batch),
                         ("states_per_trajectory", per)):  # fmt: skip
        check_whole(name, number, 1)
    for name, number in (("noise", noise), ("explore", explore)):
        check_number(name, number, least=0, also=(None,))
    check_number("correlation", correlation, least=0, most=1)
    check_number("held_out", held_out, above=0, below=1)
