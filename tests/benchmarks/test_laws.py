"""Tasks on exact laws: draws against quadrature, closed forms, figures beside their floors, real runs, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support.bench_settings import configured
from support.made_once import made_once
from support.places import ROOT
from torch import Tensor

from benchmarks import report
from benchmarks.core.bench import Bench
from benchmarks.core.config import LawConfig, TransportConfig
from benchmarks.core.runner import run
from benchmarks.core.runs import collect
from benchmarks.laws import report as law_report
from benchmarks.laws.laws import Flowing, Law, Mover, Staged
from benchmarks.laws.quadrature import Quadrature
from benchmarks.laws.task import LawTask
from benchmarks.methods import make_method
from benchmarks.methods.bounds import LawIdentity, LawOracle
from benchmarks.methods.transport import FlowMover, joined_across, tournaments
from benchmarks.tasks import load_task
from benchmarks.tasks.cycle import Cycle
from benchmarks.tasks.line import Line
from benchmarks.tasks.mixture import Mixture
from benchmarks.tasks.ring import Ring
from pfm import EncodedPairs, FlowConfig
from pfm.distances import sliced_wasserstein
from pfm.statistics import small_sample_factor

LAWS: list[Law] = [Line(), Mixture(), Ring(), Cycle()]
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
BENCH = Bench("surface", "truncate", 0, False)
SMALL = LawConfig(name="law", pairs=2000, draws=3, samples=1500, directions=32, energy_samples=300)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_context(law: Law, count: int) -> Tensor | None:
    shown = law.shown()
    return None if shown is None else shown[1].expand(count, -1)


# -- laws -----------------------------------------------------------------------------------------------------------


@each_law
def test_tournaments_and_quadrature_agree_on_every_round(law: Law):
    context, count = one_context(law, 20_000), 20_000
    exact = Quadrature.of(law, None if context is None else context[0], rounds=3)
    assert exact.mass.sum(1).tolist() == pytest.approx([1] * 4, abs=1e-6)
    rewards, wins = exact.rewards(), exact.wins()
    assert wins[0] == pytest.approx(0.5, abs=1e-6)
    assert wins == sorted(wins)
    for number in range(4):
        y = law.round(number, context, count, generator(number))
        beaten = law.preference(y, law.reference(context, count, generator(9)), context)
        assert float(beaten.mean()) == pytest.approx(wins[number], abs=4 * float(beaten.std()) / count**0.5)
        reward = law.reward(y, context)
        if reward is not None:
            assert rewards is not None
            assert float(reward.mean()) == pytest.approx(rewards[number], abs=4 * float(reward.std()) / count**0.5)


@each_law
def test_draws_of_a_round_have_the_density_of_the_quadrature(law: Law):
    context, count = one_context(law, 6000), 6000
    exact = Quadrature.of(law, None if context is None else context[0], rounds=2)
    drawn = torch.multinomial(exact.mass[2], count, replacement=True, generator=generator())
    width = (law.box[1] - law.box[0]) / (1000 if law.dimension == 1 else 40)
    of_mass = exact.points[drawn] + width * (torch.rand(count, law.dimension, generator=generator()) - 0.5)
    fresh, other, earlier = (law.round(k, context, count, generator(k + n)) for k, n in ((2, 0), (2, 1), (1, 0)))
    floor = sliced_wasserstein(fresh, other, directions=32)
    assert sliced_wasserstein(of_mass, fresh, directions=32) < 2.2 * floor
    assert sliced_wasserstein(earlier, fresh, directions=32) > 3 * floor


@each_law
def test_a_law_keeps_its_promises(law: Law):
    count = 50_000
    context = law.contexts(count, generator())
    y, other = (law.reference(context, count, generator(seed)) for seed in (1, 2))
    assert y.shape == (count, law.dimension)
    assert law.context_dimension == (0 if context is None else context.shape[1])
    p = law.preference(y, other, context)
    assert torch.allclose(p + law.preference(other, y, context), torch.ones(count), atol=1e-6)
    assert float(law.label(y, other, context, generator()).float().mean()) == pytest.approx(0.5, abs=0.01)
    low, high = law.box
    assert int(((y < low) | (y > high)).any(1).sum()) <= 1
    assert float((~law.supported(y, context)).float().mean()) < 1e-3
    assert not bool(law.supported(y + 100, context).any())
    pairs = law.pairs(count, generator(3))
    assert float(law.preference(pairs.chosen, pairs.rejected, pairs.context).mean()) > 0.52


def test_rounds_of_a_tournament_follow_the_labels_and_not_only_the_reward():
    law = Mixture()
    y, other = law.reference(None, 100, generator()), law.reference(None, 100, generator(1))
    share = torch.stack([law.label(y, other, None, generator(seed)) for seed in range(400)]).float().mean(0)
    assert float((share - law.preference(y, other, None)).abs().max()) < 5 * (0.25 / 400) ** 0.5


def test_the_line_has_its_closed_forms():
    law, exact = Line(), Quadrature.of(Line(), rounds=4)
    assert exact.rewards() == pytest.approx([2**k / (2**k + 1) for k in range(5)], abs=1e-5)
    u = torch.linspace(0.005, 0.995, 100)[:, None]
    assert torch.allclose(exact.density(u)[2], 4 * u[:, 0].double() ** 3, atol=5e-3)
    # The marginal velocities, integrated, are the maps that join equal quantiles.
    for velocity, known in ((law.reference_velocity, law.reference_map), (law.rejected_velocity, law.rejected_map)):
        moved, steps = u.double(), 2000
        for step in range(steps):  # the midpoint rule
            middle = moved + velocity(step / steps, moved) / (2 * steps)
            moved = moved + velocity((step + 0.5) / steps, middle) / steps
        assert float((moved - known(u.double())).abs().max()) < 2e-3


def test_the_line_sorts_tied_and_outer_numbers():
    law, y = Line(), torch.tensor([[-0.5], [0.25], [1.005], [1.5]])
    assert law.preference(y, y, None).tolist() == [0.5] * 4
    assert law.supported(y, None).tolist() == [False, True, True, False]
    assert law.distribution(y, 2).tolist() == [0, 0.25**4, 1, 1]


def test_the_cycle_has_rounds_and_no_limit():
    law = Cycle()
    exact = Quadrature.of(law, rounds=20)
    mode = law.mode(exact.points)
    shares = torch.stack([exact.mass[:, mode == number].sum(1) for number in range(3)], dim=1)
    gain = 2 * law.beats - 1
    known = torch.tensor(law.shares, dtype=torch.float64)
    for found in shares:
        assert torch.allclose(found, known, atol=1e-5)
        known = known * (1 + gain * (known.roll(-1) - known.roll(1)))
    product = shares.prod(1)
    assert bool((product.diff() < 0).all())
    assert len(set(shares.argmax(1).tolist())) == 3  # each has its turn
    outwards = exact.mean(exact.points.norm(dim=1))
    assert bool((outwards.diff() > 0).all())
    even = Quadrature.of(Cycle(shares=(1 / 3, 1 / 3, 1 / 3)), rounds=3)
    assert float(even.mass[3, law.mode(even.points) == 0].sum()) == pytest.approx(1 / 3, abs=1e-6)
    assert law.reward(exact.points, None) is None


def test_the_ring_needs_its_context():
    law, count = Ring(), 4000
    context = law.contexts(count, generator())
    best = 2 * context
    assert torch.allclose(law.reward(best, context), torch.full((count,), 2.0), atol=1e-5)
    assert torch.allclose(law.aligned(best, context), torch.tensor([2.0, 0.0]).expand(count, -1), atol=1e-5)
    y = law.round(2, context, count, generator(1))
    assert float(law.reward(y, context).mean()) > 1
    assert abs(float(law.reward(y, context[torch.randperm(count)]).mean())) < 0.1
    with pytest.raises(ValueError, match=r"context \(B, 2\) is missing"):
        law.reward(y, None)


# -- what is measured -----------------------------------------------------------------------------------------------


class Constant:
    """Gives one point, the best of the mixture, always."""

    draws, evaluations = 1, None

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        return {}

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        return torch.tensor([2.0, 0.0]).expand_as(y)


class Rounds(LawOracle):
    """Draws rounds 1 and 2 exactly."""

    def stages(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> dict[int, Tensor]:
        return {number: self.law.round(number, context, len(y), generator) for number in (1, 2)}


class Blind(Rounds):
    """Draws the winners' law under contexts that belong to others."""

    def stages(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> dict[int, Tensor]:
        assert context is not None
        return {1: self.law.round(1, context.roll(len(y) // 2, 0), len(y), generator)}


class Broken(LawIdentity):
    """Gives what is not finite."""

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        return y / 0


def figures(law: Law, method: object, config: LawConfig = SMALL) -> tuple[float, dict[str, float]]:
    outcome = LawTask(law, config, 0).run(method, BENCH)
    return outcome.score, {name: found.value for name, found in outcome.figures.items() if found is not None}


@each_law
def test_exact_draws_score_the_floor_and_untouched_ones_do_not(law: Law):
    score, exact = figures(law, LawOracle())
    assert score == pytest.approx(-1, abs=0.45)
    for name, apart in {"off_support": 0.002, "diversity": 0.12, "win": 0.03, "reward": 0.1}.items():
        if name in exact:
            assert exact[name] == pytest.approx(exact[f"{name}_floor"], abs=apart)
    untouched, same = figures(law, LawIdentity())
    assert untouched < 1.6 * score
    assert same["win"] == pytest.approx(0.5, abs=0.02)
    assert same.get("gain", 0.0) == 0
    if "gain_share" in exact:
        assert exact["gain_share"] == pytest.approx(1, abs=0.1)
    assert ("kolmogorov_smirnov" in exact) == (law.dimension == 1)


def test_the_score_does_not_reward_one_output_for_all():
    score, found = figures(Mixture(), Constant())
    assert found["win"] > 0.7 > 0.61 > figures(Mixture(), LawOracle())[1]["win"]
    assert found["diversity"] == 0
    assert score < figures(Mixture(), LawIdentity())[0]


def test_outputs_under_the_wrong_contexts_are_far_from_the_law():
    score, found = figures(Ring(), Blind())
    assert score < 5 * figures(Ring(), LawOracle())[0]
    assert abs(found["gain_share"]) < 0.1
    assert found["off_support"] < 0.001


def test_rounds_are_held_against_the_laws_of_their_rounds():
    score, found = figures(Line(), Rounds())
    assert score == pytest.approx(-1, abs=0.4)
    assert found["reward"] == found["round_2.reward"] == pytest.approx(4 / 5, abs=0.01)
    assert found["round_1.reward"] == pytest.approx(2 / 3, abs=0.02)
    assert found["round_1.sliced_wasserstein_ratio"] == pytest.approx(1, abs=0.4)
    assert found["round_1.kolmogorov_smirnov"] < 0.05


def test_what_a_method_has_seen_does_not_touch_what_it_is_measured_on():
    task, other = LawTask(Line(), SMALL, 0), LawTask(Line(), SMALL, 1)
    assert torch.equal(task.pairs().chosen, LawTask(Line(), SMALL, 0).pairs().chosen)
    assert not torch.equal(task.pairs().chosen, other.pairs().chosen)
    assert figures(Line(), LawIdentity()) == figures(Line(), LawIdentity())
    assert len(LawTask(Line(), LawConfig(name="line", limit=7), 0).pairs()) == 7


def test_what_does_not_move_is_refused():
    with pytest.raises(TypeError, match="Line does not move outputs"):
        LawTask(Line(), SMALL, 0).run(Line(), BENCH)
    with pytest.raises(ValueError, match=r"Broken must give finite outputs \(1500, 1\) in round 1"):
        LawTask(Line(), SMALL, 0).run(Broken(), BENCH)


# -- methods --------------------------------------------------------------------------------------------------------


def test_champions_have_the_law_of_their_round():
    law = Ring()
    pairs, votes = tournaments(law, 2, 9000, generator())
    assert votes == 9000
    assert pairs.candidates is not None
    assert len(pairs.candidates) == 3000
    best = torch.stack([entry.rows[entry.scores.argmax()] for entry in pairs.candidates])
    contexts = pairs.context_rows(torch.tensor([entry.context_index for entry in pairs.candidates]))
    champions = float(law.reward(pairs.output_rows(best), contexts).mean())
    exact = Quadrature.of(law, law.shown()[0], rounds=2).rewards()
    assert exact is not None
    assert champions == pytest.approx(exact[2], abs=0.09)
    assert float(law.reward(pairs.chosen, pairs.context).mean()) == pytest.approx(exact[1], abs=0.09)


def test_joining_across_contexts_keeps_the_laws_and_loses_the_pairs():
    train = Ring().pairs(2000, generator())
    joined = joined_across(train, generator(1))
    assert train.context is not None
    assert joined.context is not None
    rows = torch.cat([joined.chosen, joined.context], dim=1)
    known = torch.cat([train.chosen, train.context], dim=1)
    assert torch.equal(rows.sort(0).values, known.sort(0).values)  # winners keep their contexts
    place = torch.cdist(joined.chosen, train.chosen).argmin(1)
    own = (joined.rejected == train.rejected[place]).all(1) | (joined.rejected == train.chosen[place]).all(1)
    assert float(own.float().mean()) < 0.2
    distance = (joined.chosen - joined.rejected).square().sum(1).mean()
    assert float(distance) < 0.2 * float((train.chosen - train.rejected).square().sum(1).mean())
    with pytest.raises(ValueError, match="ignores the contexts of a task that has none"):
        joined_across(Line().pairs(10, generator()), generator())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": "swaped"}, "labels must be one of"),
        ({"mode": "gate"}, "mode must be one of"),
        ({"rounds": 2}, "rounds=2 needs mode"),
        ({"mode": "relabel", "labels": "shuffled"}, "goes with labels='given'"),
        ({"flow": {"best_of": 3}}, "power of two"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        FlowMover(TransportConfig(name="flow", **changes))


@pytest.mark.parametrize(("mode", "source"), [("relabel", "reference"), ("reapply", "reference")])
def test_stages_end_where_one_call_ends(mode: str, source: str):
    made = FlowMover(TransportConfig(name="flow", mode=mode, rounds=2, flow={"residual": False, "source": source}))
    made.learn(Line(), Line().pairs(500, generator()), BENCH)
    y = Line().reference(None, 200, generator(1))
    stages = made.stages(y, None, generator())
    assert list(stages) == [1, 2]
    assert torch.allclose(stages[2], made.move(y, None, generator()), atol=1e-5)
    assert not torch.allclose(stages[1], stages[2], atol=1e-2)


@pytest.mark.parametrize("name", ["line", "mixture", "ring", "cycle"])
def test_every_task_is_configured(name: str):
    settings = configured(f"task={name}", "method=law_oracle", "task.pairs=10", "seed=4")
    task = load_task(settings.task, settings.seed)
    assert isinstance(task, LawTask)
    assert (task.law.name, task.seed, len(task.pairs())) == (name, 4, 10)
    assert isinstance(make_method(settings.method), Mover)


def test_the_sweeps_name_known_tasks_and_flows_with_known_settings():
    tasks, methods = {}, {}
    for name in ("laws", "laws_in_context"):
        params = cast(Any, OmegaConf.load(ROOT / "conf" / "experiment" / f"{name}.yaml")).hydra.sweeper.params
        tasks |= {task.strip(): name for task in params.task.split(",")}
        methods |= {method.strip(): name for method in params.method.split(",")}
    assert set(tasks) == {law.name for law in LAWS}
    for method in methods:
        settings = configured("task=ring", f"method={method}")
        made = make_method(settings.method)
        assert isinstance(made, Mover)
        if isinstance(settings.method, TransportConfig):
            assert isinstance(made, Staged)
            assert isinstance(made, Flowing)
            FlowConfig.from_dict(settings.method.flow)


# -- runs and the report --------------------------------------------------------------------------------------------

FAST = ("method.flow.hidden=48", "method.flow.layers=3", "method.flow.ema=0.97",
        "method.flow.batch_size=256", "method.flow.steps=4")  # fmt: skip
RUNS = {
    "line": ("law_identity", "law_oracle", "flow_reference", "flow_shuffled", "flow_swapped", "flow_relabel"),
    "ring": ("law_identity", "flow_reference", "flow_across"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run small flows and their controls on two laws, those that learn nothing twice."""
    return made_once(tmp_path_factory, "laws", _run_all)


def _run_all(folder: Path) -> None:
    small = {"line": ("task.pairs=2000",), "ring": ("task.pairs=3000",)}
    for task, methods in RUNS.items():
        for method in methods:
            more = small[task]
            if method.startswith("flow"):
                more += (*FAST, f"method.flow.epochs={10 if task == 'line' else 16}")
            if method == "flow_relabel":
                more += ("method.rounds=2",)
            for seed in (0, 1) if method.startswith("law") else (0,):
                settings = configured(
                    f"task={task}", f"method={method}", f"seed={seed}", f"out={folder}", "threads=1", "progress=false",
                    "task.draws=3", "task.samples=2000", "task.energy_samples=300", *more,
                )  # fmt: skip
                place = folder / f"{task}-{method}-{seed}"
                place.mkdir()
                run(settings, place)


def measured(runs: Path, name: str) -> dict[str, float]:
    found = json.loads((runs / name / "metrics.json").read_text())["figures"]
    return {key: value["value"] for key, value in found.items() if value is not None}


def test_flows_learn_the_law_and_their_controls_do_not(runs: Path):
    line = {method: measured(runs, f"line-{method}-0") for method in RUNS["line"]}
    assert line["flow_reference"]["gain_share"] == pytest.approx(1, abs=0.08)
    assert abs(line["flow_shuffled"]["gain_share"]) < 0.12
    assert line["flow_swapped"]["gain_share"] == pytest.approx(-1, abs=0.12)
    ratio = {method: found["sliced_wasserstein_ratio"] for method, found in line.items()}
    assert ratio["law_oracle"] < 1.6
    assert ratio["flow_reference"] < 0.3 * ratio["law_identity"] < 0.4 * ratio["flow_swapped"]


def test_relabelling_follows_the_rounds(runs: Path):
    found = measured(runs, "line-flow_relabel-0")
    assert found["round_1.reward"] == pytest.approx(2 / 3, rel=0.03)
    assert found["reward"] == found["round_2.reward"] == pytest.approx(4 / 5, rel=0.03)
    assert found["labels"] == 4000
    assert found["evaluations"] == 2 * measured(runs, "line-flow_reference-0")["evaluations"] == 32


def test_joining_across_contexts_costs_the_gain(runs: Path):
    assert measured(runs, "ring-flow_reference-0")["gain_share"] > 0.6
    assert measured(runs, "ring-flow_across-0")["gain_share"] < 0.25


def test_a_run_keeps_what_figures_need_and_little_more(runs: Path):
    metrics = json.loads((runs / "ring-flow_reference-0" / "metrics.json").read_text())
    assert metrics["kind"] == "law"
    assert metrics["about"]["exact"]["reward"][1] == pytest.approx(0.630, abs=1e-3)
    path = runs / "ring-flow_reference-0" / "draws.npz"
    assert path.stat().st_size < 300_000
    with np.load(path) as arrays:
        assert arrays["reference"].shape == arrays["exact"].shape == (3, 500, 2)
        assert arrays["moved"].shape == (1, 3, 500, 2)
        assert arrays["path"].shape == (17, 3, 150, 2)
        assert np.allclose(arrays["path"][0], arrays["reference"][:, :150], atol=1e-5)
        assert np.abs(arrays["path"][-1] - arrays["moved"][0, :, :150]).mean() < 0.02  # in steps of another size
        assert arrays["velocity"].shape == (3, 3, 289, 2)
        cell = (5.6 / 64) ** 2
        assert np.allclose(arrays["density"].astype(float).sum(-1) * cell, 1, atol=0.01)


def test_the_report_adds_up(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import pyarrow.parquet as parquet

    assert report.main([str(runs), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == printed
    line, ring = json.loads((tmp_path / "report.json").read_text())
    assert (line["kind"], line["task"], ring["task"]) == ("law", "line", "ring")
    methods = {method["name"]: method for method in line["methods"]}
    assert line["methods"][0]["name"] == "law_oracle"
    both = [measured(runs, f"line-law_oracle-{seed}")["reward"] for seed in (0, 1)]
    assert methods["law_oracle"]["seeds"] == [0, 1]
    assert methods["law_oracle"]["figures"]["reward"]["value"] == pytest.approx(np.mean(both))
    reward = methods["law_oracle"]["figures"]["reward"]
    # The percentile interval of two seeds runs from one to the other; Student's is as much wider as so few ask for.
    below = np.mean(both) - min(both)
    assert reward["low"] == pytest.approx(np.mean(both) - small_sample_factor(2) * below)
    assert set(methods["flow_relabel"]["rounds"]) == {"1", "2"}
    assert line["floor"]["reward"]["value"] == pytest.approx(2 / 3, abs=0.02)
    assert "| **Exact draws of round 1** | 1 | 1 |" in printed
    assert "Flow, four rounds of labels | 2 |" in printed
    assert any("flow_reference has no run of seed 1" in note for note in line["notes"])
    table = parquet.read_table(tmp_path / "report.parquet").to_pylist()
    rows = {(row["task"], row["method"], row["seed"], row["figure"]): row for row in table}
    assert len(rows) == len(table)
    found = measured(runs, "ring-flow_across-0")
    assert rows["ring", "flow_across", 0, "gain_share"]["value"] == found["gain_share"]
    assert rows["ring", "flow_across", 0, "kolmogorov_smirnov"]["value"] is None
    for name in ("outputs", "field", "trajectories", "tradeoff"):
        for task in RUNS:
            assert (tmp_path / f"{task}-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_averaged_without_the_outer_quarters(runs: Path):
    found = [law for law in collect([runs]) if law.task == "line" and law.method == "law_identity"][:1]
    copies = []
    for seed, value in enumerate((1.0, 2.0, 3.0, 100.0)):
        metrics = json.loads(json.dumps(found[0].metrics))
        metrics["settings"]["seed"] = seed
        metrics["figures"]["win"] = {"value": value, "low": value, "high": value}
        copies.append(type(found[0])(found[0].folder, metrics))
    (task,) = law_report.compare(copies)
    win = task.methods[0].figures["win"]
    assert win is not None
    assert win.value == 2.5
    stretch = small_sample_factor(4)
    assert 2.5 - stretch * 1.5 <= win.low < 2.5 < win.high <= 2.5 + stretch * 97.5
