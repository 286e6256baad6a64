"""Fields of a user's own: what they learn, where they survive, and what is refused before training."""

import copy
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.places import ROOT
from torch import nn

import pfm
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow.registered_field import FIELDS, RegisteredField, register_field
from pfm.preferences import BradleyTerry, MeanShift

DEVICE = os.environ.get("PFM_TEST_DEVICE", "cpu")
SHAPE = (2, 3)


@register_field("bias")
class Bias(nn.Module):
    """Moves every output by the same displacement."""

    def __init__(self, event_shape, context_dimension):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(event_shape))

    def forward(self, t, y, context):
        return self.value.expand_as(y)


@register_field("affine")
class Affine(nn.Module):
    """Is affine in t, y and context, on flattened outputs."""

    def __init__(self, event_shape, context_dimension, *, bias=True, tied=False, norm=False, transposed=False):
        super().__init__()
        size = event_shape.numel()
        self.layer = nn.Linear(1 + size + context_dimension, size, bias=bias)
        self.norm = nn.BatchNorm1d(size) if norm else nn.Identity()
        if tied:
            self.again = nn.Linear(1 + size + context_dimension, size, bias=bias)
            self.again.weight = self.layer.weight
        if transposed:
            self.layer.weight = nn.Parameter(self.layer.weight.detach().T.contiguous().T)

    def forward(self, t, y, context):
        parts = [t[:, None], y.flatten(1), *([] if context is None else [context])]
        return self.norm(self.layer(torch.cat(parts, 1))).view_as(y)


def shifted_pairs(count=240, contexts=0, seed=0):
    """Make pairs of which the chosen one is the rejected one, displaced, under each context by another multiple."""
    generator = torch.Generator().manual_seed(seed)
    rejected = torch.randn(count, *SHAPE, generator=generator)
    context = torch.eye(contexts)[torch.arange(count) % contexts] if contexts else None
    shift = torch.linspace(-1, 1, 6).view(SHAPE)
    if context is not None:
        shift = shift * torch.arange(1.0, contexts + 1)[torch.arange(count) % contexts, None, None]
    return EncodedPairs(rejected + shift, rejected, context, group=torch.arange(count))


def settings(field="affine", **changes):
    return FlowConfig(
        **{
            "field": field,
            "epochs": 40,
            "learning_rate": 0.03,
            "batch_size": 64,
            "sigma": 0.0,
            "source": "rejected",
            "linear": False,
        }
        | changes
    )


def fit(pairs, config, **options):
    """Fit a flow with a closed form for b, which is not what is tested here."""
    return PreferenceFlow.fit(pairs, config, preference=MeanShift(), progress=False, **options)


def outputs(count=20, contexts=0, seed=9) -> tuple[torch.Tensor, Any]:
    y = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return y, torch.eye(contexts)[torch.arange(count) % contexts] if contexts else None


@pytest.fixture(scope="module")
def flow():
    return fit(shifted_pairs(contexts=3), settings())


# -- what is learned ------------------------------------------------------------------------------------------------


def test_one_displacement_is_learned_exactly():
    flow = fit(shifted_pairs(), settings("bias", epochs=60))
    y, _ = outputs()
    shift = torch.linspace(-1, 1, 6).view(SHAPE)
    torch.testing.assert_close(flow.transport(y), y + shift, atol=0.02, rtol=0)
    for strength in (0.25, 2.0):
        torch.testing.assert_close(flow.transport(y, strength=strength), y + strength * shift, atol=0.04, rtol=0)
    path = flow.trajectory(y, times=[0.0, 0.5, 1.0])
    torch.testing.assert_close(path[1], y + shift / 2, atol=0.02, rtol=0)
    assert flow.metadata["training"]["gain"] > 0.95
    assert "field 'bias' kept at" in flow.summary()
    assert "no linear part" in flow.summary()


def test_a_field_sees_its_context(flow):
    y, x = outputs(30, 3)
    shift = torch.linspace(-1, 1, 6).view(SHAPE) * torch.arange(1.0, 4)[torch.arange(30) % 3, None, None]
    apart = (flow.transport(y, x) - y - shift).square().mean().sqrt()
    assert apart < 0.15 * shift.square().mean().sqrt()
    assert (flow.transport(y, x.roll(1, 0)) - y - shift).square().mean().sqrt() > 0.5 * shift.square().mean().sqrt()


def test_labels_without_meaning_move_nothing():
    pairs = shifted_pairs()
    coin = (torch.rand(len(pairs), generator=torch.Generator().manual_seed(1)) < 0.5)[:, None, None]
    y, other = (part.view(-1, *SHAPE) for part in (pairs.chosen, pairs.rejected))
    shuffled = EncodedPairs(torch.where(coin, y, other), torch.where(coin, other, y), group=pairs.group)
    flow = fit(shuffled, settings("bias"))
    assert flow.metadata["training"]["gain"] == 0
    y, _ = outputs()
    torch.testing.assert_close(flow.transport(y), y, atol=1e-5, rtol=0)


def test_it_learns_what_the_linear_part_leaves():
    flow = fit(shifted_pairs(), settings(linear=True))
    y, _ = outputs()
    # The closed-form part knows the displacement: nothing is left for the field, and it is dropped.
    torch.testing.assert_close(flow.transport(y), y + torch.linspace(-1, 1, 6).view(SHAPE), atol=1e-3, rtol=0)
    assert flow.field.residual is None


@pytest.mark.parametrize("dtype", ["float32", "medium", "bfloat16"])
def test_every_number_type_computes(dtype):
    flow = fit(shifted_pairs(contexts=2), settings(dtype=dtype, epochs=10))
    moved = flow.transport(*outputs(20, 2))
    assert moved.dtype == torch.float32
    assert bool(moved.isfinite().all())


def test_buffers_of_a_normalising_field_are_those_of_its_average():
    flow = fit(shifted_pairs(), settings(field_options={"norm": True}))
    assert isinstance(flow.field.residual, RegisteredField)
    assert int(flow.field.residual.state_dict()["module.norm.num_batches_tracked"]) > 0
    y, _ = outputs()
    shift = torch.linspace(-1, 1, 6).view(SHAPE)
    assert (flow.transport(y) - y - shift).square().mean().sqrt() < 0.5 * shift.square().mean().sqrt()


# -- where it survives ----------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_their_chunk(flow):
    y, x = outputs(1500, 3)
    moved = flow.transport(y, x)
    assert moved.shape == y.shape
    for row in (0, 1023, 1024, 1499):
        torch.testing.assert_close(flow.transport(y[row : row + 1], x[row]), moved[row : row + 1], atol=1e-5, rtol=1e-5)


def test_copies_move_outputs_alike(flow, tmp_path):
    y, x = outputs(20, 3)
    expected = flow.transport(y, x)
    pairs = shifted_pairs(contexts=3, seed=4)
    with_model = flow.with_preference(BradleyTerry().fit(shifted_pairs(contexts=3)), pairs)
    flow.save_pretrained(tmp_path)
    loaded = PreferenceFlow.from_pretrained(tmp_path)
    composed = pfm.compose([(flow, 0.5), (copy.deepcopy(flow), 0.5)])
    for twin in (copy.deepcopy(flow), with_model, loaded, composed):
        torch.testing.assert_close(twin.transport(y, x), expected, atol=1e-5, rtol=1e-5)
    assert loaded.config == flow.config
    assert hash(loaded.config) == hash(flow.config)
    assert "Affine" not in (tmp_path / "config.json").read_text()


def test_rounds_and_distillation_build_the_same_field(flow, tmp_path):
    y, x = outputs(120, 3)
    larger = MeanShift().fit(shifted_pairs(contexts=3))
    further = flow.relabel(larger, y, y.flip(0), x, progress=False)
    assert [type(each.field.residual) for each in (flow, further)] == [RegisteredField] * 2
    assert further.later[0].config.field == "affine"
    further.save_pretrained(tmp_path)
    again = PreferenceFlow.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.transport(y, x, mode="relabel"), further.transport(y, x, mode="relabel"), atol=1e-5, rtol=1e-5
    )
    student = flow.distill(y, x, progress=False)
    assert student.metadata["distilled"]["error"] < 0.2
    assert isinstance(student.field.residual, RegisteredField)


def test_a_field_without_contexts_is_built_beside_it():
    flow = fit(shifted_pairs(contexts=3), settings(context_free=True))
    y, x = outputs(20, 3)
    free = flow.transport(y, x, guidance=0.0)
    torch.testing.assert_close(free, flow.transport(y, x.roll(1, 0), guidance=0.0), atol=1e-5, rtol=1e-5)
    assert (flow.transport(y, x) - free).abs().max() > 0.1


@pytest.mark.skipif(DEVICE == "far", reason="torch unties weights that it moves to the imitated device")
def test_tied_weights_are_saved(tmp_path):
    flow = fit(shifted_pairs(), settings(field_options={"tied": True}, epochs=5))
    flow.save_pretrained(tmp_path)
    y, _ = outputs()
    torch.testing.assert_close(PreferenceFlow.from_pretrained(tmp_path).transport(y), flow.transport(y))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stopped_fit_goes_on(tmp_path, monkeypatch, transposed):
    """Also with a parameter that does not lie in rows, as a file's tensors do."""

    class Stopped(Exception):
        pass

    whole = fit(shifted_pairs(), settings(field_options={"transposed": transposed}))
    from pfm.flow import training

    save = training._Checkpoint.save

    def stop_after(self, state):
        save(self, state)
        if state.log.updates >= 20:
            raise Stopped

    monkeypatch.setattr(training._Checkpoint, "save", stop_after)
    with pytest.raises(Stopped):
        fit(shifted_pairs(), settings(field_options={"transposed": transposed}), checkpoint=tmp_path)
    monkeypatch.undo()
    resumed = fit(shifted_pairs(), settings(field_options={"transposed": transposed}), checkpoint=tmp_path)
    y, _ = outputs()
    torch.testing.assert_close(resumed.transport(y), whole.transport(y), atol=1e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_flow():
    one, two = (fit(shifted_pairs(), settings(epochs=5)) for _ in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_images_without_a_linear_part_hold_no_matrices(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rejected = torch.randn(12, 3, 16, 16, generator=generator)
    pairs = EncodedPairs(rejected + 1, rejected)
    flow = fit(pairs, settings("bias", epochs=2, steps=1))
    assert sum(value.numel() for name, value in flow.state_dict().items() if name.startswith("field")) < 4 * 768
    assert flow.transport(rejected).shape == rejected.shape
    # Earlier versions saved matrices of zeros.
    from safetensors.torch import load_file, save_file

    flow.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["field.linear.matrices"], tensors["field.linear.shifts"] = torch.zeros(12, 768, 768), torch.zeros(12, 768)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(PreferenceFlow.from_pretrained(tmp_path).transport(rejected), flow.transport(rejected))


@pytest.mark.skipif(DEVICE not in ("far", "cuda"), reason="nothing is recorded on the CPU")
def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    from pfm.flow import cuda_graphs as graphs

    @register_field("waiting")
    class Waiting(Affine):
        def forward(self, t, y, context):
            return super().forward(t, y, context) * (1.0 if float(y.detach().sum()) < 1e9 else 0.0)

    y, _ = outputs()
    with monkeypatch.context() as patch:
        patch.setenv(graphs.OFF, "0")
        expected = fit(shifted_pairs(), settings("waiting", epochs=5)).transport(y.to(DEVICE))
    if DEVICE == "far":
        from support import far_device

        monkeypatch.setattr(graphs, "supported", lambda device: device.type == "far")
        monkeypatch.setattr(graphs, "capture", lambda work, device: far_device.capture(work))
    flow = fit(shifted_pairs(), settings("waiting", epochs=5))
    for _ in range(5):
        torch.testing.assert_close(flow.transport(y.to(DEVICE)).cpu(), expected.cpu(), atol=1e-4, rtol=1e-4)
    assert "going on without" in caplog.text


# -- what is refused ------------------------------------------------------------------------------------------------


def test_loading_without_the_field_says_how_to_register_it(flow, tmp_path, monkeypatch):
    flow.save_pretrained(tmp_path)
    code = f"""
import pfm
try:
    pfm.PreferenceFlow.from_pretrained({str(tmp_path)!r})
except pfm.NotRegisteredError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    for part in ("config.json", "'affine'", "@pfm.register_field('affine')"):
        assert part in found.stdout, found.stdout + found.stderr


def test_a_saved_field_of_another_size_is_refused(flow, tmp_path):
    flow.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["config"]["field_options"] = {"bias": False}
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"does not fit its config\.json at field\.residual\.module\.layer\.bias"):
        PreferenceFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": "affin"}, "did you mean 'affine'"),
        ({"field": "affine", "field_options": {"width": 3}}, "unexpected keyword argument 'width'"),
        ({"field": "affine", "field_options": {"bias": torch.zeros(1)}}, "must be JSON values"),
        ({"field": "affine", "field_options": [1]}, "must be a dict"),
        ({"field": "affine", "hidden": 64}, "hidden is of field='mlp'"),
        ({"field": "affine", "residual": False}, "residual=False leaves out field='affine'"),
        ({"field_options": {"bias": True}}, "field_options are of a registered field"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FlowConfig(**changes)


def test_options_are_what_they_will_be_after_loading():
    given = {"bias": True}
    config = FlowConfig(field="affine", field_options=given)
    given["bias"] = False
    assert config.field_options == {"bias": True}
    assert FlowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


class Wrong(nn.Module):
    """Makes one mistake."""

    def __init__(self, event_shape, context_dimension, mistake):
        super().__init__()
        self.mistake = mistake
        self.weight = nn.Parameter(torch.ones(event_shape), requires_grad=mistake != "nothing to learn")
        if mistake == "built by values":
            self.start = nn.Parameter(torch.zeros(len(torch.arange(3).tolist())))
            self.scale = float(self.weight.detach().sum())
        if mistake == "another size":
            self.more = nn.Parameter(torch.zeros(next(SIZES)))

    def forward(self, t, y, context):
        if self.mistake == "flat":
            return (y * self.weight).flatten(1)
        if self.mistake == "scalar":
            return (y * self.weight).sum()
        if self.mistake == "float32":
            return (y * self.weight).float()
        if self.mistake == "mixes rows":
            return y * self.weight - y.mean(0)
        if self.mistake == "fails":
            return y * self.weight + torch.ones(7)
        return y * self.weight


SIZES = iter(range(1, 100))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("nothing to learn", "no parameters to learn"),
        ("built by values", "cannot be built under torch.device"),
        ("another size", "built with the same tensors"),
        ("flat", r"shape of y, \(3, 2, 3\): got \(3, 6\)"),
        ("scalar", r"got \(\)"),
        ("float32", "number type, torch.float64: got torch.float32"),
        ("mixes rows", "another velocity alone"),
        ("fails", r"fails on t \(3,\), y \(3, 2, 3\)"),
    ],
)
def test_mistakes_are_named_before_training(mistake, message):
    if "wrong" not in FIELDS:
        register_field("wrong")(Wrong)
    with pytest.raises(ValueError, match=message):
        fit(shifted_pairs(), settings("wrong", field_options={"mistake": mistake}))


def test_names():
    with pytest.raises(ValueError, match="the library's own"):
        register_field("mlp")(Bias)
    with pytest.raises(ValueError, match=r"'bias' is .*Bias already"):
        register_field("bias")(Affine)
    with pytest.raises(ValueError, match="letters, digits"):
        register_field("two words")(Bias)
    with pytest.raises(TypeError, match="the name comes first"):
        register_field(Bias)(Bias)  # pyright: ignore[reportArgumentType]
    register_field("bias")(Bias)  # as when a cell of a notebook runs again
    register_field("no-module")(lambda event_shape, context_dimension: None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"must be built as a torch\.nn\.Module"):
        PreferenceFlow((2,), 0, FlowConfig(field="no-module"))


# -- what is built on flows -----------------------------------------------------------------------------------------


def test_pools_and_policies_take_flows_of_it(tmp_path):
    from pfm.pbrl.fast import FastTransport
    from pfm.references import PooledFlow, TaggedPairs

    pairs = shifted_pairs(80)
    source = torch.arange(len(pairs)) % 2
    tagged = TaggedPairs(pairs, source, source, ("one", "other"))
    pooled = PooledFlow.fit(tagged, settings(linear=True, source="reference", epochs=2), progress=False)
    pooled.save(tmp_path)
    loaded = PooledFlow.load(tmp_path)
    assert loaded.flow.config.field == "affine"
    y, _ = outputs()
    torch.testing.assert_close(loaded.transport(y, tag="one"), pooled.transport(y, tag="one"))
    flow = fit(pairs, settings(epochs=2))
    assert FastTransport.of(flow) is None
    assert FastTransport.of(fit(pairs, FlowConfig(residual=False))) is not None
