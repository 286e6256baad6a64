"""The fit of a field against closed forms: the ridge, the number of steps, what is left out."""

import math
import warnings

import pytest
import torch

from pfm import EncodedPairs, FlowConfig
from pfm.flow import fitting
from pfm.flow.couplings import Joined, Paired, make_coupling
from pfm.flow.fields import Field, LinearField, Moments, Normalizer
from pfm.flow.fitting import (
    RIDGES,
    STEP_CHOICES,
    FieldFit,
    at_most,
    choose_steps,
    fit_field,
    matmul_precision,
    on_unit_sphere,
)
from pfm.flow.integration import STAGES, integrate
from pfm.flow.training import TrainingLog

LINEAR = FlowConfig(residual=False, sigma=0.0, device="cpu")


def straight(rate: float, count: int = 10) -> tuple[Field, Normalizer, Joined]:
    """Make the field dy/dt = rate y in one dimension, and samples to choose its steps on."""
    field = Field(1, 0, 4, 1)
    field.drop_residual()
    with torch.no_grad():
        field.linear.matrices.fill_(rate)
    y = torch.linspace(-2, 2, count)[:, None]
    return field, Normalizer(1, 0), Joined(y, y, None)


def error_of(rate: float, steps: int, solver: str) -> float:
    """Give the error of ``steps`` steps on dy/dt = rate y, relative to the distance moved: y (e^rate - 1)."""
    z = rate / steps
    growth = {"euler": 1 + z, "heun2": 1 + z + z**2 / 2, "rk4": 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24}[solver]
    return abs(growth**steps - math.exp(rate)) / abs(math.exp(rate) - 1)


@pytest.mark.parametrize(("rate", "solver"), [(1.0, "euler"), (-2.0, "euler"), (3.0, "heun2"), (3.0, "rk4")])
@pytest.mark.parametrize("tolerance", [0.1, 0.02])
def test_the_fewest_steps_within_the_tolerance_are_chosen(rate, solver, tolerance):
    config = FlowConfig(solver=solver, steps="auto", tolerance=tolerance, device="cpu")
    steps, error, evaluations = choose_steps(*straight(rate), config)
    assert steps == next(steps for steps in STEP_CHOICES if error_of(rate, steps, solver) <= tolerance)
    assert error == pytest.approx(error_of(rate, steps, solver), rel=1e-3, abs=1e-6)
    assert evaluations == steps * STAGES[solver]


def test_a_field_that_hardly_moves_gets_one_step_and_a_rough_one_a_warning():
    config = FlowConfig(solver="euler", steps="auto", tolerance=0.01, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps, error, _ = choose_steps(*straight(1e-5), config)
    assert steps == 1
    assert error is not None
    assert error < 1e-4  # in units of a thousandth of the spread, the least distance that errors are compared with
    with pytest.warns(RuntimeWarning, match="128 steps of euler are .* above tolerance=1e-07"):
        found = choose_steps(*straight(2.0), config.replace(tolerance=1e-7))
    assert found == (128, pytest.approx(error_of(2.0, 128, "euler"), rel=1e-3), 128)
    with pytest.warns(RuntimeWarning, match="128 steps of heun2"):
        assert choose_steps(*straight(4.0), config.replace(tolerance=1e-9, solver="heun2"))[2] == 256


def test_steps_are_chosen_on_some_of_many_rows_the_same_in_every_call(monkeypatch):
    monkeypatch.setattr(fitting, "STEP_ROWS", 5)
    field, normalizer, check = straight(1.0, count=40)
    drawn = []

    def draw(index, generator):
        drawn.append((index.tolist(), generator.initial_seed()))
        return Joined.draw(check, index, generator)

    monkeypatch.setattr(check, "draw", draw)
    for seed in (3, 3, 4):
        choose_steps(field, normalizer, check, FlowConfig(seed=seed, device="cpu"))
    assert drawn == [(at_most(40, 5, seed).tolist(), 0) for seed in (3, 3, 4)]


def test_given_steps_are_taken_and_an_adaptive_solver_counts_its_own():
    assert choose_steps(*straight(1.0), FlowConfig(solver="heun2", steps=7, device="cpu")) == (7, None, 14)
    steps, error, evaluations = choose_steps(*straight(1.0), FlowConfig(solver="dopri5", device="cpu"))
    assert (steps, error) == (1, None)
    field, _, check = straight(1.0)
    assert evaluations == integrate(field.at(None), check.source, (0.0, 1.0), solver="dopri5").evaluations > 6


def test_steps_are_chosen_under_the_rows_own_contexts():
    """What moves these rows, dy/dt = y + x from y = 0, is their context alone: y_1 = x (e - 1)."""
    field = Field(1, 1, 4, 1)
    field.drop_residual()
    with torch.no_grad():
        field.linear.matrices.fill_(1.0)
    check = Joined(torch.zeros(10, 1), torch.zeros(10, 1), torch.linspace(-1, 1, 10)[:, None])
    config = FlowConfig(solver="euler", steps="auto", tolerance=0.02, device="cpu")
    steps, error, _ = choose_steps(field, Normalizer(1, 1), check, config)
    assert steps == next(steps for steps in STEP_CHOICES if error_of(1.0, steps, "euler") <= 0.02) > 10
    assert error == pytest.approx(error_of(1.0, steps, "euler"), rel=1e-3)


# -- the linear part ------------------------------------------------------------------------------------------------


def fitted(train: EncodedPairs, held: EncodedPairs, **options) -> tuple[Field, FieldFit]:
    linear = options.get("linear", True)
    field, normalizer = Field(train.dimension, 0, 8, 1, linear=linear), Normalizer(train.dimension, 0)
    normalizer.fit(train.chosen, train.rejected, None)
    field.unit.copy_(normalizer.displacement)
    one_step = options.pop("one_step", False)
    coupling, check = (Paired(part, "rejected") for part in (train, held))
    config = LINEAR.replace(**options)
    found = fit_field(field, normalizer, coupling, check, config, one_step=one_step, progress=False)
    return field, found


def noise_pairs(seed: int) -> EncodedPairs:
    """Draw ten pairs in eight dimensions in which the winner has nothing to do with the loser."""
    one, other = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(seed))
    return EncodedPairs(one, other)


@pytest.mark.parametrize("seed", range(3))
def test_the_ridge_is_judged_on_held_out_pairs(seed):
    """On the fitted pairs no ridge is ever better than the smallest; on others such a slope fits noise."""
    train = noise_pairs(seed)
    assert fitted(train, noise_pairs(50 + seed))[1].ridge >= 1e-1
    assert fitted(train, train)[1].ridge == 1e-6


def test_a_shift_needs_no_slope_and_an_exact_slope_no_ridge():
    y = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    field, found = fitted(EncodedPairs(y + 3, y), EncodedPairs(y + 3, y))
    assert found.to_dict()["residual_kept"] is False
    assert field.residual is None
    field, found = fitted(EncodedPairs(2 * y, y), EncodedPairs(2 * y, y), one_step=True)
    assert found.ridge == 1e-6
    normalizer = Normalizer(2, 0)
    normalizer.fit(2 * y, y, None)
    moved = field(torch.tensor(0.0), normalizer(y), None) * normalizer.scale
    torch.testing.assert_close(moved, y, atol=1e-3, rtol=1e-3)
    assert torch.equal(field.linear.matrices, field.linear.matrices[:1].expand(12, -1, -1))


@pytest.mark.parametrize("one_step", [False, True])
def test_the_linear_part_is_fitted_to_the_paths_noise_and_times(one_step):
    """A single step is judged at t = 0 alone and has no noise on its way."""
    times = {"times": (0.0,)} if one_step else {}
    ridges = set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        for count in (12, 30):
            y, noise = torch.randn(2, count, 3, generator=generator)
            pairs.append(EncodedPairs(5 * (0.5 * y + noise), 5 * y))
        field, found = fitted(*pairs, one_step=one_step, sigma=0.3)
        normalizer = Normalizer(3, 0)
        normalizer.fit(pairs[0].chosen, pairs[0].rejected, None)
        noise = (0.0 if one_step else 0.3) ** 2 * normalizer.displacement.square()
        moments, judged = (
            Moments.of([Paired(part, "rejected").draw(torch.arange(len(part)))], normalizer, noise) for part in pairs
        )
        ridge = moments.best_ridge(RIDGES, judged, normalizer.displacement, **times)
        assert found.ridge == ridge
        ridges.add(ridge)
        linear = LinearField(3, 0)
        linear.fit(moments, ridge, at_start=one_step)
        torch.testing.assert_close(field.linear.matrices, linear.matrices, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(field.linear.shifts, linear.shifts, atol=1e-4, rtol=1e-4)
    assert len(ridges) > 1


def test_moments_are_of_the_same_rows_for_the_same_seed(monkeypatch):
    monkeypatch.setattr(fitting, "MOMENT_ROWS", 20)
    pairs = EncodedPairs(*torch.randn(2, 60, 2, generator=torch.Generator().manual_seed(0)))

    def matrices(seed: int) -> torch.Tensor:
        field, normalizer = Field(2, 0, 8, 1), Normalizer(2, 0)
        normalizer.fit(pairs.chosen, pairs.rejected, None)
        coupling = make_coupling(pairs, source="rejected", coupling="independent")
        fit_field(field, normalizer, coupling, coupling, LINEAR.replace(seed=seed), progress=False)
        return field.linear.matrices

    torch.manual_seed(0)
    first, other = matrices(1), matrices(2)
    assert torch.equal(matrices(1), first)
    assert not torch.equal(first, other)


# -- with a residual ------------------------------------------------------------------------------------------------


class Watched(Joined):
    """Notes the precision of products under which its samples are drawn."""

    def draw(self, index, generator=None):
        self.precisions = [*getattr(self, "precisions", []), torch.get_float32_matmul_precision()]
        return super().draw(index, generator)


class Notes:
    """Is a tracker that keeps what it is told."""

    def __init__(self):
        self.seen = []

    def log(self, values, step=None):
        self.seen.append((step, values))

    def finish(self):
        pass


def test_the_residual_learns_what_is_not_linear_in_the_precision_asked_for(tmp_path):
    y = torch.linspace(-2, 2, 64)[:, None]
    train, held = (Watched(part, part + 2 * part.relu(), None) for part in (y[::2], y[1::2]))
    field, normalizer = Field(1, 0, 32, 2), Normalizer(1, 0)
    normalizer.fit(y + 2 * y.relu(), y, None)
    field.unit.copy_(normalizer.displacement)
    config = LINEAR.replace(residual=True, dtype="medium", epochs=150, batch_size=32)
    notes = Notes()
    found = fit_field(
        field, normalizer, train, held, config, checkpoint=tmp_path / "state", progress=False, tracker=notes
    )
    assert notes.seen == [(update, {"validation_loss": loss}) for update, loss in found.log.validation]
    assert len(notes.seen) > 1
    assert found.log.updates == found.log.planned_updates == 150
    assert found.log.loss < 0.3 * found.log.plain_loss
    assert found.log.gain > 0.8
    assert field.residual is not None
    assert field.gain == found.log.gain
    assert found.to_dict()["residual_kept"] is True
    assert (tmp_path / "state" / "training.safetensors").is_file()
    assert train.precisions[0] == torch.get_float32_matmul_precision() != "medium"  # moments are exact
    assert set(train.precisions[1:]) == {"medium"}
    assert not torch.equal(field.linear.matrices[0], field.linear.matrices[-1])  # by default at every time


def test_without_a_linear_part_there_is_none():
    train = noise_pairs(0)
    field, found = fitted(train, train, linear=False)
    assert found.ridge == math.inf
    assert not bool(field.linear.matrices.any())
    assert not bool(field.linear.shifts.any())


def test_what_was_found_is_told_as_json_values():
    told = FieldFit(math.inf, TrainingLog(updates=3, gain=0.5)).to_dict()
    assert told["ridge"] is None
    assert told["residual_kept"] is True
    assert told["training"]["updates"] == 3
    assert told["training"]["loss"] is None
    assert told["training"]["validation"] == []
    assert FieldFit(0.1, TrainingLog()).to_dict()["ridge"] == 0.1
    assert FieldFit(0.1, TrainingLog()).to_dict()["residual_kept"] is False


def test_some_numbers_are_taken_of_many_and_all_of_few():
    assert at_most(4, 4, 0).tolist() == [0, 1, 2, 3]
    some = at_most(100, 10, 3)
    assert len(set(some.tolist())) == 10
    assert some.tolist() == sorted(some.tolist())
    assert some.tolist() == at_most(100, 10, 3).tolist() != at_most(100, 10, 4).tolist()
    assert max(some) > 50


@pytest.mark.parametrize(
    ("dtype", "device", "wanted"),
    [("medium", "cpu", "medium"), ("float32", "cpu", "high"), ("auto", "cpu", "high"),
     ("auto", "cuda", "medium"), ("float32", "cuda", "highest")],
)  # fmt: skip
def test_the_precision_of_products_is_set_and_put_back(dtype, device, wanted):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with matmul_precision(dtype, torch.device(device)):
            assert torch.get_float32_matmul_precision() == wanted
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_results_go_to_the_unit_sphere_as_configured_or_where_all_outputs_lie_on_it():
    unit = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    auto = FlowConfig()
    assert on_unit_sphere(unit, -unit, auto)
    assert not on_unit_sphere(unit, 1.01 * unit, auto)
    assert not on_unit_sphere(2 * unit, 2 * unit, auto)
    assert not on_unit_sphere(unit.new_ones(6, 1), unit.new_ones(6, 1), auto)  # a label or a sign
    assert not on_unit_sphere(unit, unit, auto.replace(unit_norm="off"))
    assert on_unit_sphere(2 * unit, unit, auto.replace(unit_norm="on"))
