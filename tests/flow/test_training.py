"""The training of the residual against closed forms: weights, held-out prompts, averages, what is confirmed."""

import math

import pytest
import torch
from torch import Tensor

from pfm import FlowConfig
from pfm.flow.couplings import Coupled
from pfm.flow.fields import Field, Normalizer
from pfm.flow.problem import STRATA, FlowProblem
from pfm.flow.training import TrainingLog, _best_multiple, _Order, _schedule, _ValidationRows, train_residual

SHORT = FlowConfig(epochs=80, patience=1000, batch_size=64, device="cpu")


class Weighted:
    """Joins given samples (N, 1), with weights (N,) and prompts (N,)."""

    rows_per_item = 1
    device = torch.device("cpu")

    def __init__(self, source: Tensor, target: Tensor, weight: Tensor, group: Tensor) -> None:
        self.source, self.target, self.weight, self.group = source, target, weight, group

    def __len__(self) -> int:
        return len(self.source)

    def group_of(self, index: Tensor) -> Tensor:
        return self.group[index]

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        return Coupled(self.source[index], self.target[index], None, self.weight[index])


def two_ways(up: float, prompts: int = 10) -> Weighted:
    """Join 0 to 1 with weight ``up`` and to -1 with weight 2 - up, once a prompt: the best velocity is up - 1."""
    target = torch.tensor([[1.0], [-1.0]]).repeat(prompts, 1)
    weight = torch.tensor([up, 2 - up]).repeat(prompts)
    return Weighted(torch.zeros(2 * prompts, 1), target, weight, torch.arange(prompts).repeat_interleave(2))


def one_step_problem() -> FlowProblem:
    """Make the problem of a single Euler step in one dimension, without a linear part, in the outputs' own units."""
    torch.manual_seed(0)
    return FlowProblem(Field(1, 0, 16, 2), Normalizer(1, 0), 0.0, one_step=True)


def trained(train: Weighted, held: Weighted, config: FlowConfig = SHORT) -> tuple[FlowProblem, TrainingLog]:
    problem = one_step_problem()
    return problem, train_residual(problem, train, held, config, progress=False)


def test_a_rows_weight_counts_in_the_loss_that_is_trained_on():
    problem, log = trained(two_ways(1.8), two_ways(1.8))
    assert log.plain_loss == pytest.approx(1.0, abs=2e-3)
    assert log.loss == pytest.approx(1 - 0.8**2, abs=5e-3)  # (1.8 (1 - v)^2 + 0.2 (1 + v)^2) / 2 at v = 0.8
    assert log.gain == pytest.approx(1.0, abs=0.05)
    with torch.no_grad():
        assert float(problem.model(torch.tensor(0.0), torch.zeros(1, 1))) == pytest.approx(0.8, abs=0.05)


def test_validation_is_on_the_held_out_rows_and_keeps_the_best_average():
    _, log = trained(two_ways(1.8), two_ways(0.2))
    assert (log.best_update, log.gain) == (0, 0.0)
    assert log.loss == log.plain_loss
    assert min(loss for _, loss in log.validation) > log.plain_loss
    problem, log = trained(two_ways(1.8), two_ways(1.8))
    assert problem.model.residual is not None
    rows = _ValidationRows(problem, two_ways(1.8), SHORT.seed)
    assert dict(log.validation)[log.best_update] == log.loss == min(loss for _, loss in log.validation)
    assert rows.loss(problem.model.residual) == pytest.approx(log.loss, rel=1e-5)


def test_the_averaged_network_is_judged_and_kept_and_not_the_last():
    slow = SHORT.replace(epochs=40, ema=0.999, learning_rate=0.05)
    problem, log = trained(two_ways(1.8), two_ways(1.8), slow)
    assert problem.model.residual is not None
    kept = _ValidationRows(problem, two_ways(1.8), slow.seed).loss(problem.model.residual)
    assert kept == pytest.approx(log.loss, rel=1e-5)


# -- what held-out prompts confirm ----------------------------------------------------------------------------------


def judged(products: list[list[float]], weight: list[float], target: float = 1.0) -> tuple[float, float]:
    """Give the confirmed gain of a network that says 1 where the target is ``target``, one row a prompt.

    ``products``: of every moment, the prediction p of each row, whose multiple g improves by g (2 p t - g p^2).
    """
    count = len(weight)
    held = Weighted(torch.zeros(count, 1), torch.full((count, 1), target), torch.tensor(weight), torch.arange(count))
    rows = _ValidationRows.__new__(_ValidationRows)
    rows.y, rows.target, rows.weight = held.source, held.target, held.weight
    rows.t, rows.context, rows.group, rows.item = torch.zeros(count), None, held.group, held.group

    class One(torch.nn.Module):
        def forward(self, t: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
            return torch.ones_like(y)

    moments = [torch.stack([torch.tensor(each) * target, torch.tensor(each).square()], 1) for each in products]
    return rows.confirmed_gain(One(), moments)


def test_an_improvement_of_every_prompt_is_confirmed_at_its_best_multiple():
    assert judged([[1.0] * 10], [1.0] * 10)[0] == 1.0
    assert judged([[0.5] * 10], [1.0] * 10, target=0.4)[0] == pytest.approx(0.4)
    assert judged([[-1.0] * 10], [1.0] * 10)[0] == 0.0


def test_a_moment_is_chosen_on_the_prompts_that_do_not_judge_it():
    """Each moment helps one half of the prompts as much as it harms the other."""
    first = [1.0 if number % 2 == 0 else -1.0 for number in range(12)]
    gain, z = judged([first, [-value for value in first]], [1.0] * 12)
    assert gain == 0.0
    assert z < 0


def test_weights_decide_what_is_confirmed():
    """Four prompts in ten get worse by more than the other six gain; what is confirmed is the weighted mean."""
    says = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]
    assert judged([says], [1.0] * 10)[0] == 0.0
    assert judged([says], [1.0] * 6 + [1e-3] * 4)[0] > 0
    assert judged([says], [1e-3] * 6 + [1.0] * 4)[1] < judged([says], [1.0] * 6 + [1e-3] * 4)[1]


def test_what_is_not_confirmed_is_dropped_though_a_multiple_improves():
    one_better = [1.0] + [0.0] * 9
    gain, z = judged([one_better], [1.0] * 10)
    assert gain == 0.0
    assert z < 1.645


@pytest.mark.parametrize(
    ("product", "square", "multiple"),
    [(1.0, 4.0, 0.25), (4.0, 4.0, 1.0), (5.0, 4.0, 1.0), (-1.0, 4.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_the_best_multiple_lies_between_nothing_and_all(product, square, multiple):
    assert _best_multiple(torch.tensor([product, square])) == multiple


# -- batches and rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "items"), [(10, 3), (10, 5), (3, 7), (1, 4)])
def test_every_pair_is_seen_once_an_epoch_in_batches_of_one_size(count, items):
    order = _Order(count, items, 0, torch.device("cpu"))
    assert order.an_epoch == math.ceil(count / items)
    for epoch in range(3):
        batches = [order.at(epoch * order.an_epoch + place) for place in range(order.an_epoch)]
        assert {len(batch) for batch in batches} == {items}
        assert torch.cat(batches)[:count].sort().values.tolist() == list(range(count))
    first = [_Order(count, items, 0, torch.device("cpu")).at(number).tolist() for number in (0, order.an_epoch)]
    assert first[0] == _Order(count, items, 0, torch.device("cpu")).at(0).tolist()
    if count == 10:
        assert first[0] != first[1]
        assert first[0] != _Order(count, items, 1, torch.device("cpu")).at(0).tolist()


def test_the_rate_warms_up_and_falls_by_a_cosine():
    rates = [_schedule(update, 200) for update in range(200)]
    assert rates[:10] == pytest.approx([number / 10 for number in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[105] == pytest.approx(0.5)
    assert rates[199] == pytest.approx((1 + math.cos(math.pi * 189 / 190)) / 2)
    assert [_schedule(update, 4000) for update in (0, 99, 100)] == pytest.approx([0.01, 1.0, 1.0])
    assert _schedule(0, 1) == 1.0


# -- taking up a run ------------------------------------------------------------------------------------------------


def stopped(folder, after: int, train: Weighted, config: FlowConfig = SHORT) -> None:
    seen = []

    def watch(update: int, loss: float) -> None:
        seen.append(update)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_residual(
            one_step_problem(), train, two_ways(1.8), config, checkpoint=folder, progress=False, on_validation=watch
        )


@pytest.mark.parametrize("after", [1, 4, 39])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, after):
    whole, log = trained(two_ways(1.8), two_ways(1.8))
    stopped(tmp_path, after, two_ways(1.8))
    resumed = one_step_problem()
    begun = []
    again = train_residual(
        resumed, two_ways(1.8), two_ways(1.8), SHORT, checkpoint=tmp_path, progress=False,
        on_validation=lambda update, loss: begun.append(update),
    )  # fmt: skip
    assert begun[0] == log.validation[after][0]  # it went on, and did not begin anew
    assert again == log
    for mine, theirs in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("train", "config"),
    [(two_ways(1.7), SHORT), (two_ways(1.8, prompts=12), SHORT), (two_ways(1.8), SHORT.replace(seed=1))],
    ids=["other weights", "other rows", "another seed"],
)
def test_a_state_of_other_data_is_refused(tmp_path, train, config):
    stopped(tmp_path, 2, two_ways(1.8))
    with pytest.raises(ValueError, match="belongs to other data or another configuration"):
        train_residual(one_step_problem(), train, two_ways(1.8), config, checkpoint=tmp_path, progress=False)


# -- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [STRATA, 3 * STRATA // 2, 16 * STRATA, 16 * STRATA + STRATA // 2, 17 * STRATA])
def test_times_are_stratified_and_divide_the_items(items):
    problem = FlowProblem(Field(2, 0, 4, 1), Normalizer(2, 0), 0.1)
    times = problem.times(items, torch.Generator().manual_seed(0), torch.device("cpu"))
    count = len(times)
    assert count == problem.strata(items)
    assert items % count == 0
    assert torch.equal((times * count).long(), torch.arange(count))  # one in each of equal strata
    if problem.stratified:
        assert count == (STRATA if items >= 16 * STRATA and items % STRATA == 0 else STRATA // 2)
    else:
        assert count == items


def test_the_noise_of_a_batch_has_its_shape_and_its_generator():
    problem = FlowProblem(Field(2, 0, 4, 1), Normalizer(2, 0), 0.1)
    batch = Coupled(torch.zeros(7, 2), torch.ones(7, 2), None, torch.ones(7))
    noise, again = (problem.noise(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert noise is not None
    assert again is not None
    assert noise.shape == (7, 2)
    assert torch.equal(noise, again)
    assert FlowProblem(Field(2, 0, 4, 1), Normalizer(2, 0), 0.0).noise(batch, torch.Generator()) is None
