"""The closed-form linear part against Gaussian laws; the loss; moments."""

import math

import pytest
import torch

from pfm import EncodedPairs
from pfm.flow.couplings import BestOf, Coupled, Paired, make_coupling
from pfm.flow.fields import REMEMBERED, SMALL, Field, LinearField, Moments, Normalizer, ResidualField
from pfm.flow.problem import flow_matching_loss, path_sample


def gaussian_pairs(count: int, correlation: float, seed: int = 0):
    """Draw y0 ~ N(0, 1) and y1 ~ N(2, 0.25) with the given correlation."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 1, generator=generator)
    second = torch.randn(count, 1, generator=generator)
    return first, 2 + 0.5 * (correlation * first + math.sqrt(1 - correlation**2) * second)


def fitted_linear(chosen, rejected, sigma=0.0, ridge=0.0):
    normalizer = Normalizer(chosen.shape[1], 0)
    normalizer.fit(chosen, rejected, None)
    coupling = Paired(EncodedPairs(chosen, rejected), "rejected")
    noise = (sigma * normalizer.displacement).square()
    moments = Moments.of([coupling.draw(torch.arange(len(chosen)))], normalizer, noise)
    linear = LinearField(chosen.shape[1], 0)
    linear.fit(moments, ridge)
    return linear, normalizer


@pytest.mark.parametrize("correlation", [0.0, 0.6, -0.5])
@pytest.mark.parametrize("t", [0.0, 0.17, 0.5, 0.83, 1.0])
def test_linear_part_is_the_exact_velocity_of_gaussians(correlation, t):
    source, target = gaussian_pairs(200_000, correlation)
    linear, normalizer = fitted_linear(target, source)
    y = torch.linspace(-1, 3, 9)[:, None]
    got = linear(torch.tensor(t), normalizer(y), None) * normalizer.scale
    variance = (1 - t) ** 2 + t**2 * 0.25 + 2 * t * (1 - t) * 0.5 * correlation
    cross = -(1 - t) + t * 0.25 + (1 - 2 * t) * 0.5 * correlation
    exact = 2 + cross / variance * (y - 2 * t)
    torch.testing.assert_close(got, exact, atol=0.03, rtol=0.01)


def test_linear_part_contains_the_mean_shift_at_infinite_ridge():
    source, target = gaussian_pairs(5000, 0.3)
    linear, normalizer = fitted_linear(target, source, ridge=math.inf)
    got = linear(torch.tensor(0.4), normalizer(torch.tensor([[0.0], [5.0]])), None) * normalizer.scale
    torch.testing.assert_close(got, (target - source).mean(0).expand(2, 1), atol=1e-5, rtol=1e-5)


def test_scalar_and_row_times_agree_with_context_and_without():
    for context_dimension in (0, 3):
        field = Field(4, context_dimension, 16, 2)
        assert isinstance(field.residual, ResidualField)
        with torch.no_grad():
            for tensor in (field.linear.matrices, field.linear.shifts, field.residual.last.weight, field.gain):
                tensor.copy_(torch.randn_like(tensor))
        y, context = torch.randn(6, 4), torch.randn(6, context_dimension) if context_dimension else None
        for t in (0.0, 0.3, 1.0):
            scalar = field(torch.tensor(t), y, context)
            rows = field(torch.full((6,), t), y, context)
            hoisted = field.at(context)(t, y)
            torch.testing.assert_close(scalar, rows, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(scalar, hoisted, atol=1e-5, rtol=1e-5)


def test_path_and_velocity_agree_with_a_finite_difference():
    source, target, noise = torch.randn(3, 5, 4, dtype=torch.float64)
    t, step = torch.full((5, 1), 0.3, dtype=torch.float64), 1e-6
    before, _ = path_sample(source, target, t - step, noise)
    after, _ = path_sample(source, target, t + step, noise)
    _, velocity = path_sample(source, target, t, noise)
    torch.testing.assert_close((after - before) / (2 * step), velocity, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("t", "end"), [(0.0, 0), (1.0, 1)])
def test_the_path_begins_at_the_source_and_ends_at_the_target(t, end):
    ends = torch.randn(2, 5, 4)
    y, _ = path_sample(ends[0], ends[1], torch.full((5, 1), t), torch.randn(5, 4))
    torch.testing.assert_close(y, ends[end], atol=1e-6, rtol=1e-6)


def test_the_loss_refuses_unequal_shapes():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 1, 3\)"):
        flow_matching_loss(torch.zeros(4, 3), torch.zeros(4, 1, 3))
    with pytest.raises(ValueError, match="weight"):
        flow_matching_loss(torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, 1))


def test_reference_source_has_both_members_half_each_and_rejected_the_loser():
    pairs = EncodedPairs(torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [-2.0]]))
    both = Paired(pairs, "reference").draw(torch.arange(2))
    assert both.source.flatten().tolist() == [1.0, 2.0, -1.0, -2.0]
    assert both.target.flatten().tolist() == [1.0, 2.0, 1.0, 2.0]
    assert both.weight.tolist() == [1.0] * 4
    loser = Paired(pairs, "rejected").draw(torch.arange(2))
    assert loser.source.flatten().tolist() == [-1.0, -2.0]


def test_soft_labels_weigh_both_directions():
    pairs = EncodedPairs(torch.tensor([[1.0]]), torch.tensor([[-1.0]]), probability=[0.75])
    rows = Paired(pairs, "rejected").draw(torch.arange(1))
    assert rows.source.flatten().tolist() == [-1.0, 1.0]
    assert rows.target.flatten().tolist() == [1.0, -1.0]
    assert rows.weight.tolist() == [1.5, 0.5]
    assert float(Paired(pairs, "reference").draw(torch.arange(1)).weight.mean()) == 1.0


def test_best_of_m_draws_the_law_of_the_best_of_m():
    scores = torch.arange(10.0)
    pairs = EncodedPairs.from_table(scores[:, None], [9], [0], candidates=[(0, torch.arange(10), scores)])
    coupling = BestOf(pairs, 4)
    generator = torch.Generator().manual_seed(0)
    target = coupling.draw(torch.randint(10, (200_000,), generator=generator), generator).target.flatten()
    shares = torch.bincount(target.long(), minlength=10) / len(target)
    below = torch.tensor([math.comb(rank, 4) / math.comb(10, 4) for rank in range(11)])
    torch.testing.assert_close(shares, below.diff(), atol=4e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"source": "winner"}, "source must be one of reference, rejected"),
        ({"coupling": "batch"}, "coupling must be one of"),
        ({"best_of": 4}, "candidate sets"),
        ({"best_of": 1}, "at least 2"),
    ],
)
def test_unknown_couplings_are_refused(options, told):
    pairs = EncodedPairs(torch.zeros(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match=told):
        make_coupling(pairs, **({"source": "reference", "coupling": "paired", "best_of": 2} | options))


# -- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e6])
def test_every_column_has_its_own_unit_however_small(unit):
    chosen, rejected = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(1))
    units = torch.tensor([1.0, unit, 1.0])
    plain, other = Normalizer(3, 0), Normalizer(3, 0)
    plain.fit(chosen, rejected, None)
    other.fit(chosen * units, rejected * units, None)
    torch.testing.assert_close(other.scale, plain.scale * units)
    torch.testing.assert_close(other.displacement, plain.displacement)


def test_only_constant_columns_are_given_the_scale_of_others():
    chosen, rejected = torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(2))
    for part in (chosen, rejected):
        part[:, 1] = 7.0
        part[:, 3] = 1e4 + part[:, 3] * 1e-5  # less than a float32 can tell at that height
    rejected[:, 2] = chosen[:, 2]
    normalizer = Normalizer(4, 0)
    normalizer.fit(chosen, rejected, None)
    assert normalizer.scale[1] == normalizer.scale.max()
    assert normalizer.scale[2] < 2
    assert normalizer.displacement[2] == normalizer.displacement[1] == normalizer.displacement.max()
    assert bool(torch.isfinite(normalizer(chosen)).all())


def test_the_normaliser_counts_a_pair_of_weight_two_twice():
    chosen, rejected, context = torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(3))
    weight = torch.ones(30)
    weight[::4] = 2
    twice = torch.cat([torch.arange(30), torch.arange(0, 30, 4)])
    weighted, repeated = Normalizer(4, 4), Normalizer(4, 4)
    weighted.fit(chosen, rejected, context, weight)
    repeated.fit(chosen[twice], rejected[twice], context[twice])
    for name, value in repeated.state_dict().items():
        torch.testing.assert_close(weighted.state_dict()[name], value)


# -- moments --------------------------------------------------------------------------------------------------------


def coupled_rows(seed: int, count: int = 10) -> Coupled:
    """Draw rows in the plane with one context number and uneven weights."""
    draw = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    context = draw[:, 4:5]
    target = 2 * draw[:, 2:4] + draw[:, :2] * context + context
    return Coupled(draw[:, :2], target, context, draw[:, 5].abs() + 0.1)


def at_time(rows: Coupled, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give inputs (y_t, context), the velocity without noise, and the rows' shares."""
    assert rows.context is not None
    inputs = torch.cat([(1 - t) * rows.source + t * rows.target, rows.context], 1).double()
    return inputs, (rows.target - rows.source).double(), (rows.weight / rows.weight.sum()).double()


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_moments_are_those_of_the_weighted_rows_and_of_the_noise(t):
    rows, noise = coupled_rows(0), torch.tensor([0.5, 2.0])
    covariance, mean, cross, shift = Moments.of([rows], Normalizer(2, 1), noise).at(t)
    inputs, velocity, share = at_time(rows, t)
    exact_mean, exact_shift = share @ inputs, share @ velocity
    exact = (inputs - exact_mean).T @ ((inputs - exact_mean) * share[:, None])
    exact[:2, :2] += torch.diag(noise * math.sin(math.pi * t) ** 2).double()
    exact_cross = (inputs - exact_mean).T @ ((velocity - exact_shift) * share[:, None])
    exact_cross[:2] += torch.diag(noise * math.pi * math.sin(math.pi * t) * math.cos(math.pi * t)).double()
    for found, wanted in ((mean, exact_mean), (shift, exact_shift), (covariance, exact), (cross, exact_cross)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_rows_weight_is_how_often_it_stands_in_the_moments():
    rows = coupled_rows(1, 4)
    twice = torch.tensor([0, 1, 1, 2, 3, 3, 3])
    weighted = Coupled(rows.source, rows.target, rows.context, torch.tensor([1.0, 2.0, 1.0, 3.0]))
    assert rows.context is not None
    repeated = Coupled(rows.source[twice], rows.target[twice], rows.context[twice], torch.ones(7))
    ours, theirs = (Moments.of([each], Normalizer(2, 1), torch.zeros(2)) for each in (weighted, repeated))
    torch.testing.assert_close(ours.gram, theirs.gram, atol=1e-5, rtol=1e-5)
    parts = [
        Coupled(rows.source[at], rows.target[at], rows.context[at], weighted.weight[at])
        for at in (slice(1), slice(1, 4))
    ]
    torch.testing.assert_close(
        Moments.of(parts, Normalizer(2, 1), torch.zeros(2)).gram, ours.gram, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_ridge_is_the_one_of_least_error_on_the_held_out_rows(seed):
    train, held = coupled_rows(seed, 8), coupled_rows(100 + seed, 10)
    normalizer, none, unit = Normalizer(2, 1), torch.zeros(2), torch.tensor([0.3, 3.0])
    ridges, times = (1e-3, 0.1, 1.0, 10.0, math.inf), (0.1, 0.5, 0.9)
    errors = []
    for ridge in ridges:
        error = 0.0
        for t in times:
            inputs, velocity, share = at_time(train, t)
            mean, shift = share @ inputs, share @ velocity
            covariance = (inputs - mean).T @ ((inputs - mean) * share[:, None])
            cross = (inputs - mean).T @ ((velocity - shift) * share[:, None])
            slope = torch.zeros(3, 2).double()
            if ridge < math.inf:
                slope = torch.linalg.solve(covariance + ridge * torch.eye(3).double(), cross)
            inputs, velocity, share = at_time(held, t)
            left = velocity - shift - (inputs - mean) @ slope
            error += float(share @ (left / unit.double()).square().sum(1))
        errors.append(error)
    moments, judged = (Moments.of([rows], normalizer, none) for rows in (train, held))
    assert moments.best_ridge(ridges, judged, unit, times) == ridges[errors.index(min(errors))]


def test_the_displacement_is_in_units_of_the_scale():
    chosen, rejected = torch.tensor([[6.0], [2.0]]), torch.tensor([[2.0], [-2.0]])
    normalizer = Normalizer(1, 0)
    normalizer.fit(chosen, rejected, None)
    assert float(normalizer.mean) == 2.0
    assert float(normalizer.scale) == pytest.approx(math.sqrt(8))
    assert float(normalizer.displacement) == pytest.approx(4 / math.sqrt(8))
    torch.testing.assert_close(normalizer(chosen), (chosen - 2) / math.sqrt(8))
    torch.testing.assert_close(normalizer.inverse(normalizer(chosen)), chosen)


def test_columns_have_means_and_scales_of_their_own_a_billionth_apart():
    y = torch.tensor([[1.0, 3e-9], [3.0, 1e-9], [2.0, 2e-9]])
    normalizer = Normalizer(2, 0)
    normalizer.fit(y, y.roll(1, 0), None)
    torch.testing.assert_close(normalizer.mean, torch.tensor([2.0, 2e-9]))
    torch.testing.assert_close(normalizer.scale, torch.tensor([1.0, 1e-9]) * math.sqrt(2 / 3))
    torch.testing.assert_close(normalizer.displacement, torch.full((2,), math.sqrt(3)))


def test_contexts_are_normalised_by_their_own_spread():
    normalizer, context = Normalizer(1, 2), torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    normalizer.fit(torch.ones(3, 1), torch.zeros(3, 1), context)
    assert normalizer.context(None) is None
    found = normalizer.context(context)
    assert found is not None
    torch.testing.assert_close(found.mean(0), torch.zeros(2))
    torch.testing.assert_close(found.std(0, correction=0), torch.tensor([1.0, 0.0]))
    same = torch.full((4, 1), 3.0)
    normalizer.fit(same, same, None)
    assert normalizer.scale.tolist() == normalizer.displacement.tolist() == [1.0]  # nothing varies: any unit will do


def test_moments_of_nothing_are_refused():
    rows = coupled_rows(0)
    for batches in ([], [Coupled(rows.source, rows.target, rows.context, torch.zeros(10))]):
        with pytest.raises(ValueError, match="no coupled samples with positive weight"):
            Moments.of(batches, Normalizer(2, 1), torch.zeros(2))


# -- the fields, by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 0.3, math.inf])
def test_the_linear_part_is_the_ridge_solution_at_its_nodes(ridge):
    moments = Moments.of([coupled_rows(2, 40)], Normalizer(2, 1), torch.tensor([0.1, 0.2]))
    linear = LinearField(2, 1)
    linear.fit(moments, ridge)
    angles = torch.arange(12) * math.pi / 11
    for node, t in enumerate(((1 - torch.cos(angles)) / 2).tolist()):
        covariance, mean, cross, shift = moments.at(t)
        slope = torch.zeros_like(cross)
        if ridge < math.inf:
            slope = torch.linalg.solve(covariance + ridge * torch.eye(3).double(), cross)
        torch.testing.assert_close(linear.matrices[node], slope.float(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(linear.shifts[node], (shift - mean @ slope).float(), atol=2e-3, rtol=2e-3)
    slope, offset = linear.operator(torch.tensor([0.0, 1.0, 0.4]))
    torch.testing.assert_close(slope[:2], linear.matrices[[0, -1]])
    torch.testing.assert_close(offset[:2], linear.shifts[[0, -1]])
    y, context = torch.randn(3, 2), torch.randn(3, 1)
    by_hand = (torch.cat([y, context], 1)[:, None] @ slope).squeeze(1) + offset
    torch.testing.assert_close(linear(torch.tensor([0.0, 1.0, 0.4]), y, context), by_hand)
    linear.fit(moments, ridge, at_start=True)
    assert torch.equal(linear.matrices, linear.matrices[:1].expand(12, -1, -1))
    assert torch.equal(linear.shifts, linear.shifts[:1].expand(12, -1))


def test_outputs_that_are_copies_of_each_other_have_a_finite_solution():
    """Three rows in eight dimensions leave the moments singular; what they do determine is exact all the same."""
    draw = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    rows = Coupled(draw[:, :8], draw[:, 8:], None, torch.ones(3))
    linear = LinearField(8, 0)
    linear.fit(Moments.of([rows], Normalizer(8, 0), torch.zeros(8)), 0.0)
    assert bool(torch.isfinite(linear.matrices).all())
    torch.testing.assert_close(
        linear(torch.tensor(0.0), rows.source, None), rows.target - rows.source, atol=1e-3, rtol=1e-3
    )
    # Moments with a direction of negative variance, as rounding makes them, are solved with more of a ridge.
    gram = torch.diag(torch.tensor([1.0, -1e-6, 1.0, 1.0, 1.0])).double()
    linear = LinearField(2, 0)
    linear.fit(Moments(gram, torch.zeros(2), 2), 0.0, at_start=True)
    assert bool(torch.isfinite(linear.matrices).all())
    assert linear.matrices[0, :, 0].tolist() == pytest.approx([-1.0, 0.0], abs=1e-4)


def test_interpolation_is_exact_for_polynomials_of_the_nodes_degree():
    linear = LinearField(1, 0)
    powers = torch.arange(12)
    coefficients = torch.randn(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        linear.shifts.copy_((linear._nodes[:, None] ** powers @ coefficients.double())[:, None])
    for t in (0.0, 0.123, 0.5, float(linear._nodes[4]), 0.97, 1.0):
        exact = float((torch.tensor(t).double() ** powers) @ coefficients.double())
        found = linear(torch.tensor(t), torch.zeros(1, 1), None)
        assert float(found) == pytest.approx(exact, abs=1e-4)
        assert float(linear.weights(torch.tensor([t])).sum()) == pytest.approx(1.0, abs=1e-6)


def test_what_a_field_remembers_follows_its_parameters():
    moments = Moments.of([coupled_rows(3, 40)], Normalizer(2, 1), torch.zeros(2))
    y, context = torch.randn(4, 2), torch.randn(4, 1)
    field = Field(2, 1, 8, 2)
    assert field.residual is not None
    field.gain.fill_(1.0)

    def hoisted() -> torch.Tensor:
        with torch.no_grad():
            return field.at(context)(0.37, y)

    def rows() -> torch.Tensor:
        with torch.no_grad():
            return field(torch.full((4,), 0.37), y, context)

    seen = []
    for ridge in (0.1, 10.0):
        field.linear.fit(moments, ridge)
        seen.append(hoisted())
        torch.testing.assert_close(seen[-1], rows())
        assert torch.equal(hoisted(), seen[-1])
    with torch.no_grad():
        for parameter in field.residual.parameters():
            parameter.copy_(torch.randn_like(parameter))
    seen.append(hoisted())
    torch.testing.assert_close(seen[-1], rows())
    other = Field(2, 1, 8, 2)
    other.linear.fit(moments, 1.0)
    field.load_state_dict(other.state_dict() | {"gain": torch.ones(())})
    seen.append(hoisted())
    torch.testing.assert_close(seen[-1], rows())
    assert len({round(float(each.sum()), 4) for each in seen}) == 4
    assert hoisted().dtype == torch.float32
    field.double()
    y, context = y.double(), context.double()
    assert hoisted().dtype == torch.float64
    torch.testing.assert_close(hoisted(), seen[-1].double(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        at = field.at(context)
        for number in range(2 * REMEMBERED + 1):
            at(number / 100, y)
    assert len(field.linear._at) <= REMEMBERED
    assert isinstance(field.residual, ResidualField)
    assert len(field.residual._at) <= REMEMBERED
    torch.testing.assert_close(hoisted(), rows())


@pytest.mark.parametrize(("dimension", "contexts", "layers"), [(2, 3, 1), (3, 0, 3), (SMALL, 1, 2), (SMALL + 1, 0, 2)])
def test_the_residual_is_a_perceptron_of_output_time_and_context(dimension, contexts, layers):
    generator = torch.Generator().manual_seed(0)
    field = ResidualField(dimension, contexts, 8, layers)
    y, t = torch.randn(6, dimension, generator=generator), torch.rand(6, generator=generator)
    context = torch.randn(6, contexts, generator=generator) if contexts else None
    assert not bool(field(t, y, context).any())  # it begins with nothing
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    count = 8 if dimension <= SMALL else 4
    angles = math.pi * t[:, None] * torch.arange(1, count + 1)
    features = torch.cat([2 * t[:, None] - 1, angles.sin(), angles.cos()], 1)
    state = field.state_dict()
    assert len(state) == 5 + int(contexts > 0) + 2 * (layers - 1)
    value = y @ state["from_output.weight"].T + state["from_output.bias"] + features @ state["from_time.weight"].T
    if context is not None:
        value = value + context @ state["from_context.weight"].T
    for number in range(layers - 1):
        value = torch.nn.functional.silu(value)
        value = value @ state[f"hidden.{number}.weight"].T + state[f"hidden.{number}.bias"]
    exact = torch.nn.functional.silu(value) @ state["last.weight"].T + state["last.bias"]
    torch.testing.assert_close(field(t, y, context), exact, atol=1e-4, rtol=1e-4)
    # Two blocks of three rows with equal times and contexts, the rows of a time together.
    blocks = field(t[:3], y, None if context is None else context[:3], 2)
    for block in range(2):
        part = slice(3 * block, 3 * block + 3)
        alone = field(t[:3], y[part], None if context is None else context[:3])
        torch.testing.assert_close(blocks[part], alone, atol=1e-4, rtol=1e-4)
    shared = field(t[:2], y, context)
    torch.testing.assert_close(shared, field(t[:2].repeat_interleave(3), y, context), atol=1e-4, rtol=1e-4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            at, scalar = field.at(context), field(t[0], y, context)
            for _ in range(2):
                torch.testing.assert_close(at(float(t[0]), y), scalar, atol=1e-4, rtol=1e-4)
    gradient = torch.autograd.grad(field(t, y, context).sum(), field.from_output.bias)[0]
    assert bool(gradient.any())


def test_the_residual_adds_in_units_of_the_displacement_and_by_its_gain():
    field = Field(2, 0, 8, 2)
    assert field.residual is not None
    with torch.no_grad():
        for parameter in field.residual.parameters():
            parameter.copy_(torch.randn_like(parameter))
        field.unit.copy_(torch.tensor([2.0, 0.5]))
        field.linear.shifts.fill_(3.0)
        y = torch.randn(3, 2)
        more = field.residual(torch.tensor(0.2), y, None)
        torch.testing.assert_close(field(torch.tensor(0.2), y), torch.full((3, 2), 3.0))  # its gain begins at 0
        field.gain.fill_(0.5)
        for found in (field(torch.tensor(0.2), y), field.at(None)(0.2, y)):
            torch.testing.assert_close(found, 3 + more * torch.tensor([1.0, 0.25]))
        field.drop_residual()
        assert field.residual is None
        assert float(field.gain) == 0
        torch.testing.assert_close(field.at(None)(0.2, y), torch.full((3, 2), 3.0))
        torch.testing.assert_close(field(torch.tensor(0.2), y), torch.full((3, 2), 3.0))
