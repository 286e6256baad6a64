"""Tensors on the CPU, on the device, and mixed: every public class computes, and results come back where they should.

Without a GPU the device is the CPU, and these tests run once more on an imitated one, see ``test_far_device.py``.
"""

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch

import pfm
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.devices import device_name, resolve_device

DEVICE = torch.device(os.environ.get("PFM_TEST_DEVICE", "cpu"))
CPU = torch.device("cpu")
LIGHT = FlowConfig(epochs=2, hidden=16, layers=2, batch_size=64, device=str(DEVICE))
FAR = pytest.mark.skipif(DEVICE.type != "far", reason="counts what the imitated device does")


def shifted_pairs(count: int = 160, contexts: int = 8, seed: int = 0, device: torch.device = CPU) -> EncodedPairs:
    """Make pairs in four dimensions whose first value decides, under a few contexts in three dimensions."""
    generator = torch.Generator().manual_seed(seed)
    y, other = torch.randn(2, count, 4, generator=generator)
    first = y[:, :1] > other[:, :1]
    context = torch.randn(contexts, 3, generator=generator).repeat_interleave(count // contexts, 0)
    return EncodedPairs(
        torch.where(first, y, other).to(device), torch.where(first, other, y).to(device), context.to(device)
    ).to(device)


def outputs(count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(count, 4, generator=generator), torch.randn(count, 3, generator=generator)


@pytest.fixture(scope="module")
def flow() -> PreferenceFlow:
    return PreferenceFlow.fit(shifted_pairs(), LIGHT, progress=False)


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one.cpu(), other.cpu(), rtol=tolerance, atol=tolerance)


# -- where results are ----------------------------------------------------------------------------------------------

CALLS = {
    "transport": lambda flow, y, x: flow.transport(y, x),
    "gated": lambda flow, y, x: flow.transport(y, x, mode="gated"),
    "reapply": lambda flow, y, x: flow.transport(y, x, mode="reapply", rounds=2, strength=1.5),
    "still": lambda flow, y, x: flow.transport(y, x, strength=0.0),
    "win_gradient": lambda flow, y, x: flow.transport(y, x, win_gradient=0.5),
    "trajectory": lambda flow, y, x: flow.trajectory(y, x, times=[0.0, 0.5, 1.0]),
    "velocity": lambda flow, y, x: flow.velocity(0.3, y, x),
    "slope": lambda flow, y, x: flow.win_gradient(y, x),
    "b": lambda flow, y, x: flow.win_probability(y, x),
    "candidates": lambda flow, y, x: flow.candidate_probabilities(y, x, torch.arange(len(y)) // 4),
    "alignment": lambda flow, y, x: flow.alignment(y, x[0]),
}


@pytest.mark.filterwarnings("ignore:mode='gated'")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_are_where_the_outputs_were(flow, call):
    y, x = outputs()
    near = call(flow, y, x)
    assert flow.device.type == DEVICE.type
    assert near.device == CPU
    for there, beside in ((y.to(DEVICE), x), (y.to(DEVICE), x.to(DEVICE))):
        far = call(flow, there, beside)
        assert far.device.type == DEVICE.type
        same(far, near)
    same(call(flow, y, x.to(DEVICE)), near)
    same(call(flow, y.tolist(), x.numpy()), near)


def test_pairs_may_mix_devices():
    here = shifted_pairs()
    assert here.context is not None
    mixed = EncodedPairs(
        here.chosen.to(DEVICE), here.rejected.cpu(), here.context.cpu(), torch.ones(len(here)),
        probability=torch.full((len(here),), 0.9).to(DEVICE), group=here.group.to(DEVICE),
    )  # fmt: skip
    assert mixed.device.type == DEVICE.type
    assert mixed.group.device == CPU
    batch = mixed.gather(torch.arange(5))
    assert {part.device.type for part in (batch.chosen, batch.weight, batch.probability)} == {DEVICE.type}
    train, held = mixed.split(0.25, seed=1)
    assert len(train) + len(held) == len(mixed)
    same(mixed.swap().chosen, here.rejected)
    same(mixed.to("cpu").shuffle_labels(3).chosen, mixed.shuffle_labels(3).chosen)


def test_a_fit_does_not_depend_on_where_the_pairs_are(flow):
    y, x = outputs()
    for device in (CPU, DEVICE):
        again = PreferenceFlow.fit(shifted_pairs(device=device), LIGHT, progress=False)
        same(again.transport(y, x), flow.transport(y, x), 1e-4)
        same(again.win_probability(y, x), flow.win_probability(y, x), 1e-4)


# -- everything that is fitted ---------------------------------------------------------------------------------------


def scored_pairs() -> EncodedPairs:
    table = torch.randn(48, 4, generator=torch.Generator().manual_seed(4))
    sets = [(place, torch.arange(6) + 6 * place, table[6 * place : 6 * place + 6, 0]) for place in range(8)]
    first, second = (torch.arange(48).view(8, 6)[:, part].flatten() for part in (slice(0, 3), slice(3, 6)))
    right = table[first, 0] > table[second, 0]
    return EncodedPairs.from_table(
        table, torch.where(right, first, second), torch.where(right, second, first),
        contexts=torch.eye(8), context_index=torch.arange(8).repeat_interleave(3), candidates=sets,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"coupling": "independent"},
        {"coupling": "ot"},
        {"coupling": "c2ot"},
        {"source": "rejected"},
        {"context_free": True},
        {"dtype": "bfloat16"},
        {"solver": "dopri5"},
        {"linear": False},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_kind_of_fit(settings):
    flow = PreferenceFlow.fit(shifted_pairs(), LIGHT.replace(**settings), progress=False)
    y, x = outputs()
    assert bool(torch.isfinite(flow.transport(y, x)).all())
    if settings.get("context_free"):
        assert bool(torch.isfinite(flow.transport(y, x, guidance=0.5)).all())
    assert 0 <= flow.straightness(y, x) < 100
    if settings.get("dtype"):
        moved = flow.transport(y, x)
        flow.config = flow.config.replace(dtype="float32")
        exact = flow.transport(y, x)
        assert float((moved - exact).norm()) <= 1e-2 * float((exact - y).norm())


def test_best_of_candidate_sets_and_a_preference_model_for_b():
    from pfm.preferences import HybridPreference

    pairs = scored_pairs()
    model = HybridPreference()
    flow = PreferenceFlow.fit(pairs, LIGHT.replace(best_of=4), preference=model, progress=False)
    y = outputs()[0]
    for context in (torch.eye(8)[0], torch.eye(8)[0].to(DEVICE)):
        found = flow.candidate_probabilities(y, context, torch.zeros(len(y), dtype=torch.long))
        assert found.device == CPU
        assert bool(((found >= 0) & (found <= 1)).all())
    other = flow.with_preference(model, pairs)
    same(other.win_probability(y, torch.eye(8)[0]), flow.win_probability(y, torch.eye(8)[0]), 0.2)


def test_images_and_pairs_mapped_from_files(tmp_path):
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = torch.randn(2, 60, 2, 3, 3, generator=generator)
    EncodedPairs(chosen + 0.5, rejected).save(tmp_path)
    mapped = EncodedPairs.load(tmp_path)
    flow = PreferenceFlow.fit(mapped, LIGHT, progress=False)
    moved = flow.transport(rejected.to(DEVICE))
    assert moved.shape == rejected.shape
    assert moved.device.type == DEVICE.type


def test_rounds_distillation_and_copies(flow):
    y, x = outputs(60)
    other = outputs(60)[0].flip(0)
    seen = []

    def larger(y, other, context):
        seen.append(y.device)
        return (y > other)[:, 0]

    further = flow.relabel(larger, y, other.to(DEVICE), x, progress=False, check=8)
    assert set(seen) == {CPU}
    assert further.rounds == 2
    assert further.transport(y, x, mode="relabel").device == CPU
    student = flow.distill(y, x.to(DEVICE), progress=False)
    assert student.device.type == DEVICE.type
    assert student.evaluations == 1


def test_a_flow_is_saved_anywhere_and_loaded_anywhere(flow, tmp_path):
    y, x = outputs()
    flow.save_pretrained(tmp_path)
    near = PreferenceFlow.from_pretrained(tmp_path)
    assert near.device == CPU
    same(near.transport(y, x), flow.transport(y, x))
    # A flow whose settings name a device that is not there does all that it can do here.
    moved = PreferenceFlow(near.event_shape, near.context_dimension, near.config.replace(device="cuda:7"))
    moved.load_state_dict(near.state_dict(), strict=False)
    assert moved._config_here().device == "cpu"
    same(near.to(DEVICE).transport(y, x), flow.transport(y, x))


def test_compositions_tastes_pools_and_acquisition(flow):
    from pfm.acquisition import LaplacePosterior, choose_pairs
    from pfm.preferences import BradleyTerry
    from pfm.references import PooledFlow, TaggedPairs
    from pfm.tastes import TasteMixture, taste_flows

    y, x = outputs()
    pairs = shifted_pairs()
    near = PreferenceFlow.fit(shifted_pairs(seed=1), LIGHT.replace(device="cpu"), progress=False)
    both = pfm.compose([(near, 0.5), (flow, 0.5)])
    assert both.transport(y, x).device == CPU
    assert both.device == CPU
    moved = both.to(DEVICE)
    same(moved.transport(y.to(DEVICE), x), both.transport(y, x), 1e-4)
    same(moved.trajectory(y, x.to(DEVICE), times=[0.5, 1.0]), both.trajectory(y, x, times=[0.5, 1.0]), 1e-4)
    same(moved.velocity(0.5, y, x), both.velocity(0.5, y, x), 1e-4)
    same(moved.win_probability(y.to(DEVICE), x), both.win_probability(y, x), 1e-4)

    raters = [str(number % 2) for number in range(len(pairs))]
    tastes = TasteMixture.of_groups(pairs, raters)
    assert tastes.score(y.to(DEVICE), y.flip(0), x).device.type == DEVICE.type
    adapted = tastes.adapt(pairs.select(torch.arange(5)))
    same(adapted.score(y.to(DEVICE), y.flip(0), x), adapted.score(y, y.flip(0), x))
    assert taste_flows(pairs, raters, LIGHT).transport(y, x).device == CPU

    tagged = TaggedPairs.of(pairs, ["a", "b"] * (len(pairs) // 2), ["b", "a"] * (len(pairs) // 2))
    pool = PooledFlow.fit(tagged, LIGHT, progress=False)
    assert pool.flow.device.type == DEVICE.type
    same(pool.transport(y.to(DEVICE), x, tag="a"), pool.transport(y, x.to(DEVICE), tag="a"))
    same(pool.win_probability(y.to(DEVICE), x, tag="a"), pool.win_probability(y, x, tag="a"))
    assert tagged.shuffle_labels().win_rates().rates.shape == (2, 2)

    posterior = LaplacePosterior().fit(pairs)
    assert posterior.score(y.to(DEVICE), y).device.type == DEVICE.type
    for model in (None, posterior, [BradleyTerry().fit(pairs), BradleyTerry().fit(shifted_pairs(seed=1))]):
        assert len(choose_pairs(pairs, 3, model=model, labelled=pairs).index) == 3


def preference_models() -> list:
    from pfm.preferences import (
        BradleyTerry,
        GeneralPreference,
        HybridPreference,
        PreferenceEnsemble,
        RelevancePreference,
        ViewPreference,
    )

    return [
        BradleyTerry(),
        BradleyTerry(hidden=8),
        GeneralPreference(),
        HybridPreference(),
        PreferenceEnsemble([BradleyTerry(), GeneralPreference()]),
        ViewPreference(BradleyTerry(), 0, 2),
        RelevancePreference(BradleyTerry()),
    ]


@pytest.mark.parametrize("place", range(len(preference_models())))
def test_preference_models_are_where_their_pairs_are(place, tmp_path):
    from pfm.preferences import RelevancePreference, load

    model, y = preference_models()[place], outputs()[0]
    pairs, x = shifted_pairs(device=DEVICE), outputs()[1]
    if isinstance(model, RelevancePreference):  # likeness needs contexts of the outputs' size
        pairs, x = EncodedPairs(pairs.chosen, pairs.rejected, pairs.chosen * 0.5), y.flip(0)
    model.fit(pairs)
    assert {tensor.device.type for tensor in (*model.buffers(), *model.parameters())} <= {DEVICE.type}
    near = model.score(y, y.flip(0), x)
    assert near.device == CPU
    same(model.score(y.to(DEVICE), y.flip(0), x.to(DEVICE)), near)
    same(model.score(y, y.flip(0).to(DEVICE), x), near)
    same(model.win_probability(y.to(DEVICE), y[:5], x), model.win_probability(y, y[:5].to(DEVICE), x))
    assert model.table(y.to(DEVICE), x[0]).device.type == DEVICE.type
    model.calibrate(pairs)
    model.save(tmp_path)
    same(load(tmp_path).score(y, y.flip(0), x), model.score(y, y.flip(0), x))


def test_noise_correction_returns_pairs_where_they_were():
    from pfm.preferences import corrected

    pairs = shifted_pairs(device=DEVICE).flip_labels(0.2, seed=1)
    found = corrected(pairs)
    assert found.pairs.device.type == DEVICE.type
    found = corrected(pairs, rater=torch.arange(len(pairs)) % 3)
    assert len(found.pairs) == len(pairs)


# -- long runs -----------------------------------------------------------------------------------------------------


def test_a_stopped_fit_goes_on_elsewhere(tmp_path, monkeypatch):
    from pfm.flow import training

    settings = LIGHT.replace(epochs=24)
    whole = PreferenceFlow.fit(shifted_pairs(), settings, progress=False)
    saves = []
    save = training._Checkpoint.save

    def stop(self, state):
        save(self, state)
        saves.append(state.log.updates)
        if len(saves) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        PreferenceFlow.fit(shifted_pairs(), settings, progress=False, checkpoint=tmp_path)
    monkeypatch.setattr(training._Checkpoint, "save", save)
    other = settings.replace(device="cpu")
    there = PreferenceFlow.fit(shifted_pairs().to("cpu"), other, progress=False, checkpoint=tmp_path)
    assert there.metadata["training"]["updates"] == whole.metadata["training"]["updates"]
    saves.clear()
    monkeypatch.setattr(training._Checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        PreferenceFlow.fit(shifted_pairs(), settings, progress=False, checkpoint=tmp_path)
    monkeypatch.setattr(training._Checkpoint, "save", save)
    here = PreferenceFlow.fit(shifted_pairs(), settings, progress=False, checkpoint=tmp_path)
    y, x = outputs()
    same(here.transport(y, x), whole.transport(y, x), 1e-4)


def test_streamed_batches_teach_what_resident_ones_do(monkeypatch):
    from pfm.flow import streaming, training
    from pfm.flow.couplings import make_coupling

    monkeypatch.setattr("pfm.flow.preference_flow.RESIDENT_SHARE", 0.0)
    asked = []
    streamed = streaming.streamed
    monkeypatch.setattr(training, "streamed", lambda *args: asked.append(args[1:3]) or streamed(*args))
    y, x = outputs()
    whole = PreferenceFlow.fit(shifted_pairs(), LIGHT, progress=False)
    assert bool(asked) == (DEVICE != CPU)
    monkeypatch.undo()
    same(PreferenceFlow.fit(shifted_pairs(), LIGHT, progress=False).transport(y, x), whole.transport(y, x), 1e-4)

    coupling = make_coupling(shifted_pairs().to("cpu"), source="reference", coupling="paired")
    batches = list(streaming.streamed(lambda n: coupling.draw(torch.arange(n, n + 3)), 4, 9, DEVICE))
    assert len(batches) == 5
    same(batches[2].source[:3], shifted_pairs().chosen[6:9])

    def broken(number):
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        next(streaming.streamed(broken, 0, 2, DEVICE))


@FAR
def test_a_chunk_that_does_not_fit_is_halved_and_it_is_said(flow):
    from support.far_device import memory_limit

    y, x = outputs(700)
    whole = flow.transport(y, x)
    with memory_limit(200 * 4 * 16), pytest.warns(RuntimeWarning, match="far:0 ran out of memory at 700 rows"):
        halved = flow.transport(y, x)
    assert torch.equal(halved, whole)
    with memory_limit(8), pytest.raises(torch.OutOfMemoryError):
        flow.transport(y[:1], x[:1])
    same(flow.transport(y, x), whole)


@FAR
def test_neither_training_nor_a_pass_waits_for_the_device(flow):
    from support.far_device import count_syncs

    def waits(epochs: int) -> int:
        settings = LIGHT.replace(epochs=epochs, patience=10**6)
        with count_syncs() as found:
            PreferenceFlow.fit(shifted_pairs(), settings, progress=False)
        return len(found)

    # 40 validations a run; all else must not grow with the number of updates but by the order of each epoch.
    few, many = waits(40), waits(80)
    assert many - few <= 40
    y, x = (part.to(DEVICE) for part in outputs())
    with count_syncs() as one:
        flow.transport(y, x, steps=1)
    with count_syncs() as twelve:
        flow.transport(y, x, steps=12)
    assert len(twelve) == len(one) <= 3


@pytest.mark.skipif(DEVICE.type != "cuda", reason="asks CUDA itself")
def test_cuda_is_not_waited_for_in_updates_and_passes(flow, monkeypatch):
    from pfm.flow import cuda_graphs as graphs
    from pfm.flow.integration import integrate

    y, x = (part.to(DEVICE) for part in outputs())
    field, start = flow.field.at(flow.normalizer.context(x)), flow.normalizer(y)
    run = graphs.Repeated.__call__

    def strictly(work):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return work()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with torch.no_grad():
        integrate(field, start, (0.0, 1.0), steps=3, hold=False)
        strictly(lambda: integrate(field, start, (0.0, 1.0), steps=3, hold=False))
    monkeypatch.setattr(graphs.Repeated, "__call__", lambda self, *inputs: strictly(lambda: run(self, *inputs)))
    PreferenceFlow.fit(shifted_pairs(), LIGHT.replace(epochs=20), progress=False)


@FAR
def test_recorded_updates_and_passes_are_those_that_were_run(flow, monkeypatch):
    from support import far_device

    from pfm.flow import cuda_graphs as graphs

    y, x = (part.to(DEVICE) for part in outputs())
    settings = LIGHT.replace(epochs=20)
    plain = PreferenceFlow.fit(shifted_pairs(), settings, progress=False)
    recorded = []
    monkeypatch.setattr(graphs, "supported", lambda device: device.type == "far")
    monkeypatch.setattr(graphs, "capture", lambda work, device: recorded.append(device) or far_device.capture(work))
    again = PreferenceFlow.fit(shifted_pairs(), settings, progress=False)
    assert recorded
    losses, expected = (each.metadata["training"]["validation"] for each in (again, plain))
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected])
    same(again.transport(y, x), plain.transport(y, x), 1e-4)
    recorded.clear()
    for count in (20, 5, 7, 20, 6, 8, 20):
        for _ in range(3):
            same(flow.transport(y[:count], x[:count]), plain_transport(flow, y[:count], x[:count]))
    assert 1 <= len(recorded) <= 3


def plain_transport(flow: PreferenceFlow, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    from pfm.flow.integration import integrate

    field = flow.field.at(flow.normalizer.context(x))
    with torch.no_grad():
        end = integrate(field, flow.normalizer(y), (0.0, 1.0), solver=flow.config.solver, steps=flow.steps)
    return flow.normalizer.inverse(end.states[-1])


# -- what the program has set, and what is not there -------------------------------------------------------------------


def test_a_program_may_have_set_its_own_defaults(flow):
    from pfm.preferences import BradleyTerry, corrected

    y, x = outputs()
    expected, pairs = flow.transport(y, x), shifted_pairs()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(DEVICE)
    try:
        again = PreferenceFlow.fit(pairs, LIGHT, progress=False)
        assert again.normalizer.mean.dtype == torch.float32
        found = again.transport(y, x)
        assert (found.dtype, found.device) == (torch.float32, CPU)
        assert torch.get_default_dtype() == torch.float64
        assert bool(torch.isfinite(BradleyTerry().fit(pairs).score(y, y.flip(0), x)).all())
        assert len(corrected(pairs).pairs) == 160
        assert torch.ones(1).dtype == torch.float64
        assert torch.ones(1).device.type == DEVICE.type
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    same(found, expected, 1e-4)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["inference_mode", "autocast"]
)
def test_the_mode_of_the_program_changes_no_number(flow, mode):
    from pfm.preferences import BradleyTerry

    y, x = outputs()
    pairs = shifted_pairs()

    def found() -> list[torch.Tensor]:
        inner = EncodedPairs(pairs.chosen.clone(), pairs.rejected.clone(), pairs.context)
        given = y.clone()
        return [
            PreferenceFlow.fit(inner, LIGHT, progress=False).transport(given, x),
            flow.transport(given, x.clone(), win_gradient=0.5),
            flow.win_probability(given, x),
            BradleyTerry().fit(inner).score(given, given.flip(0), x),
        ]

    expected = found()
    with mode():
        inside = found()
        fitted = PreferenceFlow.fit(pairs, LIGHT, progress=False)
    for one, other in zip(inside, expected, strict=True):
        assert one.dtype == torch.float32
        assert not one.requires_grad
        same(one, other)
    # what was fitted inside serves outside
    same(copy.deepcopy(fitted).transport(y, x, win_gradient=0.5), fitted.transport(y, x, win_gradient=0.5))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), DEVICE, str(DEVICE)])
def test_a_device_is_named_as_one_likes(device):
    assert resolve_device(device).type == torch.device(device).type
    assert FlowConfig(device=device).to_dict()["device"] == str(torch.device(device))


def test_numbers_name_cuda_devices():
    assert [device_name(each) for each in (1, "1", "cuda:1", torch.device("cuda", 1))] == ["cuda:1"] * 4


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("gpu", ValueError, "device must be one of auto, cpu, cuda, cuda:1, mps, ...: got 'gpu'"),
        (True, TypeError, "device must be a device such as .*: got bool"),
        (None, TypeError, "got NoneType"),
        ("cuda:99", ValueError, "device='cuda:99' is not on this machine, which has cpu"),
        ("meta", ValueError, "is not on this machine, which has cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(device, error, message):
    with pytest.raises(error, match=message):
        PreferenceFlow.fit(shifted_pairs(), {"device": device}, progress=False)


def test_the_environment_chooses_for_auto(monkeypatch):
    monkeypatch.setenv("PFM_DEVICE", "cpu")
    assert resolve_device() == CPU
    monkeypatch.setenv("PFM_DEVICE", "cuda:99")
    with pytest.raises(ValueError, match="PFM_DEVICE='cuda:99'"):
        resolve_device()


# -- the layers above --------------------------------------------------------------------------------------------------


def test_wrapped_generators_reports_and_explanations():
    from pfm.explain import explain

    rows = [
        {
            "prompt": f"question {number % 12}",
            "chosen": f"an answer of {'many ' * (number % 5 + 4)}words",
            "rejected": f"short {number % 7}",
        }
        for number in range(48)
    ]
    pairs, encoder = pfm.PreferencePairs.from_rows(rows), pfm.encoders.SurfaceEncoder(provides_context=True)
    flow = PreferenceFlow.fit(pairs.encode(encoder, progress=False), LIGHT, progress=False)
    assert flow.device.type == DEVICE.type
    refiner = pfm.wrap(lambda prompt: ["short 1", "an answer of many many words"], flow, encoder=encoder, n=2)
    results = refiner.batch(["question 3", "question 4"], progress=False)
    assert all(0 <= result.win_probability <= 1 for result in results)
    report = pfm.evaluate(
        refiner, ["question 1", "question 2"], judge=lambda prompt, texts: [float(len(text)) for text in texts]
    )
    assert report.rows
    assert explain(flow, pairs, encoder, resamples=20, progress=False).traits


@pytest.mark.filterwarnings("ignore:mode=.gated")
def test_control_with_a_flow_on_the_device():
    pytest.importorskip("gymnasium")
    from pfm.pbrl.arrays import BatchedPointMass
    from pfm.pbrl.collection import collect
    from pfm.pbrl.flow_policy import FlowPolicy

    class Still:
        action_space = BatchedPointMass.action_space

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.zeros((*np.asarray(observation).shape[:-1], 2), np.float32), state

    segments = collect(BatchedPointMass, Still(), 60, length=2, continuation=5, noise=0.3, seed=1)
    flow = PreferenceFlow.fit(segments.encode(), LIGHT, progress=False)
    near = copy.deepcopy(flow).to("cpu")
    seen = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    choices: list[dict[str, Any]] = [{}, {"candidates": 3}, {"win_gradient": 0.5}, {"mode": "gated"}]
    for options in choices:
        here, there = (FlowPolicy(each, Still(), seed=1, **options) for each in (flow, near))
        np.testing.assert_allclose(here.predict(seen)[0], there.predict(seen)[0], atol=1e-4)


def test_distances_of_sets_on_two_devices():
    from pfm import distances

    x, y = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(5))
    for measure in (distances.sliced_wasserstein, distances.energy_distance, distances.off_support):
        assert measure(x.to(DEVICE), y[:30]) == pytest.approx(measure(x, y[:30]), rel=1e-4)
    line, other = x[:, 0], y[:25, 0]
    assert distances.kolmogorov_smirnov(line.to(DEVICE), other) == pytest.approx(
        distances.kolmogorov_smirnov(line, other)
    )
    assert distances.diversity(x.to(DEVICE)) == pytest.approx(distances.diversity(x), rel=1e-5)
