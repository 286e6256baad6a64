"""Distances between laws against closed forms, sizes that differ, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from pfm import distances
from pfm.distances import (
    diversity,
    energy_distance,
    kolmogorov_smirnov,
    mean_distance,
    off_support,
    projected_wasserstein,
    projections,
    sliced_wasserstein,
)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- sliced Wasserstein ---------------------------------------------------------------------------------------------


def test_a_shift_moves_every_projection_by_its_component():
    x, shift = normals(500, 3), torch.tensor([3.0, -4.0, 0.0])
    # W2 between a sample and its shift is |shift . u| in direction u; the mean of the square is |shift|^2 / D.
    assert sliced_wasserstein(x, x + shift, directions=4000) == pytest.approx(5 / math.sqrt(3), rel=0.03)
    assert sliced_wasserstein(x, x) == 0


def test_gaussians_have_the_closed_form():
    x, y = normals(20_000, 2), 2 * normals(20_000, 2, seed=1) + torch.tensor([1.0, 0.0])
    # In every direction W2^2 = (shift . u)^2 + (2 - 1)^2.
    assert sliced_wasserstein(x, y, directions=256) == pytest.approx(math.sqrt(0.5 + 1), rel=0.03)


def test_one_dimension_is_exact_for_unequal_sizes():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.0], [3.0]])
    # Quantiles: (0, 0) on [0, 1/2], (1, 0) on [1/2, 2/3], (1, 3) on [2/3, 1].
    assert sliced_wasserstein(x, y) == pytest.approx(math.sqrt(1 / 6 + 4 / 3))
    assert sliced_wasserstein(y, x) == sliced_wasserstein(x, y)


@pytest.mark.parametrize("sizes", [(700, 300), (300, 700), (64, 96)])
def test_repeating_draws_changes_nothing(sizes: tuple[int, int]):
    x, y = normals(sizes[0], 4), normals(sizes[1], 4, seed=1) + 1
    assert sliced_wasserstein(x.repeat(3, 1), y) == pytest.approx(sliced_wasserstein(x, y), rel=1e-5)


def test_the_floor_is_far_below_a_real_difference():
    x, y, moved = normals(4000, 2), normals(4000, 2, seed=1), normals(4000, 2, seed=2) + 0.3
    assert sliced_wasserstein(x, moved) > 5 * sliced_wasserstein(x, y)
    assert energy_distance(x, moved) > 20 * energy_distance(x, y)


def test_sorted_projections_serve_many_comparisons():
    x, y = normals(300, 2), normals(200, 2, seed=1)
    sorted_x, sorted_y = (projections(part, directions=32, seed=5) for part in (x, y))
    assert sorted_x.shape == (32, 300)
    assert projected_wasserstein(sorted_x, sorted_y) == sliced_wasserstein(x, y, directions=32, seed=5)
    assert sliced_wasserstein(x, y, directions=32, seed=6) != sliced_wasserstein(x, y, directions=32, seed=5)


def test_chunks_do_not_change_a_result(monkeypatch: pytest.MonkeyPatch):
    x, y = normals(300, 3), normals(250, 3, seed=1)
    whole = [measure(x, y) for measure in (sliced_wasserstein, energy_distance, off_support)] + [diversity(x)]
    monkeypatch.setattr(distances, "CHUNK_VALUES", 1000)
    cut = [measure(x, y) for measure in (sliced_wasserstein, energy_distance, off_support)] + [diversity(x)]
    assert cut == pytest.approx(whole, rel=1e-5)


# -- energy ---------------------------------------------------------------------------------------------------------


def test_energy_distance_of_two_points_and_of_one_law():
    assert energy_distance(torch.zeros(3, 2), torch.tensor([[3.0, 4.0]])) == pytest.approx(10)
    x = normals(200, 2)
    assert energy_distance(x, x[torch.randperm(200)]) == pytest.approx(0, abs=1e-7)


def test_energy_distance_is_the_integral_of_distribution_functions():
    x, y = normals(900, 1), 1.5 * normals(600, 1, seed=1) + 0.5
    # Scipy gives the root.
    known = stats.energy_distance(x.flatten().numpy(), y.flatten().numpy()) ** 2
    assert energy_distance(x, y) == pytest.approx(known, rel=1e-4)
    # Uniforms on [0, 1] and [1, 2]: 2 (integral of u^2 + integral of (1 - u)^2) = 4 / 3.
    u = (torch.arange(2000)[:, None] + 0.5) / 2000
    assert energy_distance(u, u + 1) == pytest.approx(4 / 3, rel=1e-3)


# -- Kolmogorov-Smirnov ---------------------------------------------------------------------------------------------


def test_kolmogorov_smirnov_agrees_with_scipy():
    x, y = torch.rand(500, generator=torch.Generator().manual_seed(0)), normals(300, seed=1)
    assert kolmogorov_smirnov(x, y) == pytest.approx(float(stats.ks_2samp(x.numpy(), y.numpy()).statistic))  # pyright: ignore[reportAttributeAccessIssue]
    exact = kolmogorov_smirnov(x[:, None], lambda u: u.clamp(0, 1))
    assert exact == pytest.approx(float(stats.kstest(x.numpy(), "uniform").statistic), abs=1e-6)  # pyright: ignore[reportAttributeAccessIssue]


def test_kolmogorov_smirnov_of_known_steps():
    assert kolmogorov_smirnov(torch.tensor([0.5]), lambda u: u) == 0.5
    assert kolmogorov_smirnov(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])) == pytest.approx(1 / 3)
    # The winners of two uniforms have u^2: their distance to the uniform is max(u - u^2) = 1/4.
    u = ((torch.arange(5000) + 0.5) / 5000).sqrt()
    assert kolmogorov_smirnov(u, lambda v: v) == pytest.approx(0.25, abs=1e-3)


# -- support and diversity ------------------------------------------------------------------------------------------


def test_fresh_draws_of_the_reference_score_the_floor_and_far_ones_all():
    reference, fresh = normals(4000, 2), normals(4000, 2, seed=1)
    assert off_support(fresh, reference) == pytest.approx(0.01, abs=0.006)
    assert off_support(fresh, reference, level=0.9) == pytest.approx(0.1, abs=0.02)
    mixed = torch.cat([fresh[:900], fresh[:100] + 20])
    assert off_support(mixed, reference) == pytest.approx(0.9 * off_support(fresh[:900], reference) + 0.1)


def test_off_support_takes_the_kth_neighbour():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    # The second neighbour of an inner point is 1 away, of an end 2: at level 0.6 the radius is 1.
    near, far = torch.tensor([[2.5]]), torch.tensor([[4.5]])
    assert off_support(near, reference, neighbours=2, level=0.6) == 0
    assert off_support(far, reference, neighbours=2, level=0.6) == 1
    assert off_support(far, reference, neighbours=2, level=0.99) == 0


def test_diversity_counts_pairs_of_different_draws():
    y = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert diversity(y) == pytest.approx((5 + 5 + 0) / 3)
    assert diversity(torch.ones(50, 3)) == 0
    # E|X - X'| of standard normals is 2 / sqrt(pi).
    assert diversity(normals(8000, 1)) == pytest.approx(2 / math.sqrt(math.pi), rel=0.02)


def test_diversity_under_contexts_does_not_count_their_differences():
    y = normals(4000, 2, 1) + 100 * torch.arange(4000)[:, None, None]
    assert diversity(y - y.mean(1, keepdim=True)) == pytest.approx(2 / math.sqrt(math.pi), rel=0.03)
    assert diversity(normals(1, 50, 2)) == pytest.approx(diversity(normals(1, 50, 2)[0]))


def test_eight_thousand_draws_take_little_memory():
    x, y = normals(8000, 2), normals(8000, 2, seed=1)
    blocks = [block.numel() for block in distances._distances(x, y)]
    assert sum(blocks) == 8000**2
    assert max(blocks) <= distances.CHUNK_VALUES  # 16 MB
    assert mean_distance(x, y) == pytest.approx(math.sqrt(math.pi), rel=0.02)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: sliced_wasserstein(torch.zeros(3), torch.zeros(3)), r"x must be \(N, \*D\).*tensor\[:, None\]"),
        (lambda: sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 1)), "draws of one size: got 2 and 1"),
        (lambda: sliced_wasserstein(torch.zeros(3, 2), torch.zeros(0, 2)), "at least one"),
        (lambda: sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 2), directions=0), "directions.*got 0"),
        (lambda: energy_distance(torch.full((2, 1), math.nan), torch.zeros(2, 1)), "x must be finite"),
        (lambda: projected_wasserstein(torch.zeros(3, 2), torch.zeros(2, 2)), "same L directions"),
        (lambda: kolmogorov_smirnov(torch.zeros(3, 2), torch.zeros(3)), r"\(N,\) or \(N, 1\)"),
        (lambda: kolmogorov_smirnov(torch.tensor([2.0]), lambda u: u), "probabilities: got .* to 2"),
        (lambda: off_support(torch.zeros(3, 1), torch.zeros(3, 1), neighbours=3), "from 1 to 2: got 3"),
        (lambda: off_support(torch.zeros(3, 1), torch.zeros(9, 1), level=1), "level.*got 1"),
        (lambda: diversity(torch.zeros(1, 4)), "two draws"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, match: str):
    with pytest.raises(ValueError, match=match):
        call()
