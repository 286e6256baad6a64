"""Saved folders: whole after any failure, and checked before anything is allocated."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pfm._internal import archive
from pfm._internal.files import replace_json
from pfm.data import EncodedPairs
from pfm.flow import Composition, FlowConfig, PreferenceFlow
from pfm.flow.win import WinHead
from pfm.preferences import BradleyTerry, GeneralPreference, load
from pfm.references import PooledFlow
from pfm.tastes import TasteMixture


def flow_of(number: float) -> PreferenceFlow:
    """Make a flow whose weights and description both say its number."""
    torch.manual_seed(0)
    flow = PreferenceFlow([3], 2, FlowConfig(hidden=8, layers=2), {"number": number})
    flow.normalizer.mean.fill_(number)
    return flow


def number_of(flow: PreferenceFlow) -> float:
    """Read the number of a flow, and check that weights and description agree."""
    assert flow.metadata["number"] == float(flow.normalizer.mean[0])
    return flow.metadata["number"]


def composition_of(number: float) -> Composition:
    return Composition([flow_of(number), flow_of(number)], [number / 10, 1 - number / 10], ["one", "two"])


def composition_number(found: Composition) -> float:
    numbers = {number_of(flow) for flow in found.flows} | {round(float(found.weights[0]) * 10, 4)}
    assert len(numbers) == 1
    return numbers.pop()


def pool_of(number: float) -> PooledFlow:
    flow = PreferenceFlow([3], 2, FlowConfig(hidden=8, layers=2), {"number": number})
    flow.normalizer.mean.fill_(number)
    half = torch.full((2, 2), 0.5)
    return PooledFlow(flow, WinHead(5, 0), ("one", "two"), torch.tensor([number / 10, 1 - number / 10]), half, number)


def pool_number(found: PooledFlow) -> float:
    numbers = {number_of(found.flow), found.unit, round(float(found.shares[0]) * 10, 4)}
    assert len(numbers) == 1
    return numbers.pop()


def model_of(number: float) -> BradleyTerry:
    model = BradleyTerry()
    model._ready(dimension=3)
    model.found = {"number": number}
    model.mean.fill_(number)
    return model


def model_number(found: Any) -> float:
    assert found.found["number"] == float(found.mean[0])
    return found.found["number"]


def mixture_of(number: float) -> TasteMixture:
    mixture = TasteMixture(tastes=1)
    mixture.models, mixture.names, mixture.raters = [model_of(number)], ("one",), ["r"]
    mixture.found, mixture.prior = {"number": number}, (1.0, 1.0)
    mixture.shares, mixture.responsibilities = torch.tensor([1.0]), torch.ones(1, 1)
    mixture._axes = torch.full((3, 1), number)
    return mixture


def mixture_number(found: TasteMixture) -> float:
    numbers = {model_number(found.models[0]), found.found["number"], float(found._axes[0, 0])}
    assert len(numbers) == 1
    return numbers.pop()


KINDS: dict[str, tuple[Callable[[float], Any], str, Callable[[Path], Any], Callable[[Any], float]]] = {
    "flow": (flow_of, "save_pretrained", PreferenceFlow.from_pretrained, number_of),
    "composition": (composition_of, "save", Composition.load, composition_number),
    "pool": (pool_of, "save", PooledFlow.load, pool_number),
    "model": (model_of, "save", load, model_number),
    "mixture": (mixture_of, "save", TasteMixture.load, mixture_number),
}

WRITES = ("os.replace", "os.rename", "os.mkdir", "pathlib.Path.write_text", "safetensors.torch.save_file")


def failing(monkeypatch, name: str, at: int, *, for_good: bool) -> list[int]:
    """Make call number ``at`` of a function fail, or all calls from there on; the list counts the calls."""
    module, _, attribute = name.rpartition(".")
    owner: Any = {"os": os, "pathlib.Path": Path, "safetensors.torch": sys.modules["safetensors.torch"]}[module]
    real, calls = getattr(owner, attribute), [0]

    def function(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at or (for_good and calls[0] > at):
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, attribute, function)
    return calls


@pytest.mark.parametrize(
    ("kind", "name", "for_good"),
    [
        *((kind, name, True) for kind in ("flow", "pool") for name in WRITES),
        *((kind, "os.replace", False) for kind in KINDS),
    ],
)
def test_a_save_that_fails_at_any_step_leaves_the_old_or_the_new_whole(kind, name, for_good, tmp_path, monkeypatch):
    make, save, read, number = KINDS[kind]
    for at in range(1, 60):
        getattr(make(1.0), save)(tmp_path)
        with monkeypatch.context() as patched:
            calls = failing(patched, name, at, for_good=for_good)
            try:
                getattr(make(2.0), save)(tmp_path)
                failed = False
            except OSError:
                failed = True
        assert number(read(tmp_path)) == (1.0 if failed else 2.0), at
        assert not list(tmp_path.rglob(".sav*"))  # what was left does not stand in the way
        if calls[0] < at:
            return
    raise AssertionError("the calls do not end")


def killed_at(step: int, save: Callable[[], object]) -> bool:
    """Save in a child that kills itself before a step of writing, and tell whether it came so far."""
    child = os.fork()
    if child == 0:
        left = step

        def killing(real: Callable[..., Any]) -> Callable[..., Any]:
            def function(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return function

        try:
            os.replace, os.rename, os.rmdir = killing(os.replace), killing(os.rename), killing(os.rmdir)
            save()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", ["flow", "pool"])
def test_a_save_that_is_killed_at_any_step_leaves_the_old_or_the_new_whole(kind, tmp_path):
    make, save, read, number = KINDS[kind]
    new, found = make(2.0), []
    for step in range(60):
        getattr(make(1.0), save)(tmp_path)
        if not killed_at(step, lambda: getattr(new, save)(tmp_path)):
            break
        found.append(number(read(tmp_path)))
    assert found == sorted(found)
    assert set(found) == {1.0, 2.0}  # it was killed before and after the point that decides


@pytest.mark.parametrize("kind", ["flow", "composition"])
def test_readers_and_writers_at_once_see_whole_saves_only(kind, tmp_path):
    make, save, read, number = KINDS[kind]
    getattr(make(1.0), save)(tmp_path)
    children = []
    for value in (2.0, 3.0):
        child = os.fork()
        if child == 0:
            try:
                new = make(value)
                for _ in range(15):
                    getattr(new, save)(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    seen, refused = set(), []
    while children:
        try:
            seen.add(number(read(tmp_path)))
        except OSError as error:  # a slow reader beside quick writers gives up, and says so
            refused.append(str(error))
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                assert status == 0
    assert seen <= {1.0, 2.0, 3.0}
    assert all("without end" in message for message in refused)
    assert number(read(tmp_path)) in (2.0, 3.0)
    assert not list(tmp_path.rglob(".sav*"))


def test_what_a_killed_save_has_left_is_removed_later(tmp_path, monkeypatch):
    left = tmp_path / ".saving-0"
    left.mkdir()
    (left / "config.json").write_text("{}")
    flow_of(1.0).save_pretrained(tmp_path)
    assert left.exists()  # it may be another process at work
    monkeypatch.setattr(archive, "STALE_SECONDS", -1.0)
    flow_of(1.0).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_link_in_a_folder_does_not_lead_a_save_elsewhere(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    folder = tmp_path / "folder"
    flow_of(1.0).save_pretrained(folder)
    (folder / "flow-0").symlink_to(outside)
    (folder / ".saved" / "flow-0").mkdir(parents=True)
    (folder / ".saved" / "flow-0" / "mine").write_text("planted")
    with pytest.raises(ValueError, match="leads out of"):
        PreferenceFlow.from_pretrained(folder)
    assert (outside / "mine").read_text() == "mine"
    (folder / ".saved" / "flow-0" / "mine").unlink()
    (folder / ".saved" / "flow-0").rmdir()
    (folder / ".saved").rmdir()
    (folder / ".saved").symlink_to(outside)
    assert number_of(PreferenceFlow.from_pretrained(folder)) == 1.0
    assert (outside / "mine").exists()


def test_older_saves_and_the_users_own_card_stay(tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    flow_of(2.0).save_pretrained(tmp_path)
    assert [(tmp_path / name).read_text() for name in ("README.md", "notes.txt")] == ["mine", "mine too"]
    assert number_of(PreferenceFlow.from_pretrained(tmp_path)) == 2.0


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind, (make, save, read, number) in KINDS.items():
        getattr(make(1.0), save)(f"~/{kind}")
        assert number(read(Path(f"~/{kind}"))) == 1.0
        assert (tmp_path / kind).is_dir()


# ------------------------------------------------------------------------------------------- descriptions that lie


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Let this process have 2 GB more than it has, at most."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def put(value: Any, path: str, new: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        value = value[int(name) if isinstance(value, list) else name]
    value[last] = new


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("event_shape", [30000]),
        ("event_shape", [10**6, 10**6, 10**6]),
        ("event_shape", [10**30]),
        ("event_shape", [-3]),
        ("event_shape", [True, 3]),
        ("event_shape", [3.0]),
        ("event_shape", "3"),
        ("event_shape", None),
        ("event_shape", {"3": 3}),
        ("event_shape", [[3]]),
        ("context_dimension", 10**9),
        ("context_dimension", "2"),
        ("context_dimension", None),
        ("config/hidden", 10**8),
        ("config/hidden", 10**20),
        ("config/layers", 10**9),
        ("config/layers", 3),
        ("config/nonsense", 1),
        ("config", None),
        ("config", []),
        ("metadata", []),
        ("metadata/later", [{"config": {"hidden": 10**8}, "metadata": {}}]),
        ("metadata/later", [{"config": {"layers": 10**9}, "metadata": {}}]),
        ("metadata/later", 7),
        ("metadata/later", [{"config": {}, "metadata": {}}] * 2000),
        ("metadata/preference", {"draws": 10**12, "model": {"kind": "MeanShift"}}),
        (
            "metadata/preference",
            {"draws": 10**12, "model": {"kind": "MeanShift", "settings": {}, "layout": {"dimension": 10**12}}},
        ),
        ("metadata/preference", {"draws": 1, "model": {"kind": "os.system", "settings": {}, "layout": {}}}),
        ("metadata/preference", "x"),
        ("metadata/residual_kept", False),
        ("metadata/steps", 10**9),
        ("metadata/steps", -3),
        ("metadata/steps", "many"),
        ("metadata/steps", 2.5),
        ("config/steps", 10**9),
        ("metadata/later", [{"config": {}, "metadata": {"steps": 10**9}}]),
        ("metadata/unit_norm", "x"),
        ("metadata/win", "x"),
    ],
)
def test_a_description_that_lies_is_refused_before_anything_is_allocated(path, value, tmp_path, bounded_memory):
    flow_of(1.0).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    put(described, path, value)
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"config\.json"):
        PreferenceFlow.from_pretrained(tmp_path)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["normalizer.mean"][1] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: normalizer\.mean holds NaN"):
        PreferenceFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{}", '{"event_shape": [3]}', "[" * 100_000, '{"a": NaN'])
def test_a_description_that_is_none_is_refused(text, tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        PreferenceFlow.from_pretrained(tmp_path)


def test_a_description_without_end_is_not_read(tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    os.truncate(tmp_path / "config.json", 10**11)  # a file of holes
    with pytest.raises(ValueError, match=r"config\.json is damaged: it has 100,000,000,000 bytes"):
        PreferenceFlow.from_pretrained(tmp_path)


def test_a_part_brings_tensors_of_an_older_save_into_its_layout(tmp_path):
    class Newer(torch.nn.Linear):
        def upgraded(self, tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
            if f"{prefix}old" in tensors:
                tensors = {f"{prefix}weight": tensors[f"{prefix}old"], f"{prefix}bias": torch.zeros(2)}
            return tensors

    save_file({"p.0.old": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    found = archive.load_module(
        lambda: torch.nn.Sequential(Newer(3, 2)), tmp_path / "x.safetensors", "x.json", prefix="p."
    )
    assert found.state_dict()["0.weight"].tolist() == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match=r"does not fit its x\.json at p\.0\.bias: expected shape \(9,\)"):
        archive.load_module(lambda: torch.nn.Sequential(Newer(3, 9)), tmp_path / "x.safetensors", "x.json", prefix="p.")


def test_numbers_of_another_type_are_refused(tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["normalizer.mean"] = tensors["normalizer.mean"].to(torch.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"at normalizer\.mean: got numbers of another type"):
        PreferenceFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layout/dimension", 10**12),
        ("layout/dimension", 10**30),
        ("layout/planes", 10**12),
        ("layout/network", {"inputs": 10**12, "context_inputs": 3}),
        ("layout/network", 5),
        ("layout", None),
        ("settings/hidden", "wide"),
        ("settings/nonsense", 1),
        ("settings", []),
        ("kind", "Evil"),
        ("kind", []),
        ("found", 3),
    ],
)
def test_a_preference_model_that_lies_is_refused(path, value, tmp_path, bounded_memory):
    model = GeneralPreference()
    model._ready(dimension=3, contexts=2, planes=1, network={"inputs": 2, "context_inputs": 2})
    model.save(tmp_path)
    described = json.loads((tmp_path / "preference.json").read_text())
    put(described, path, value)
    (tmp_path / "preference.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"), [("names", ["n"] * 10**5), ("names", 3), ("network", False), ("unit", None)]
)
def test_a_pool_that_lies_is_refused(path, value, tmp_path, bounded_memory):
    pool_of(1.0).save(tmp_path)
    described = json.loads((tmp_path / "pool.json").read_text())
    put(described, path, value)
    (tmp_path / "pool.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="damaged"):
        PooledFlow.load(tmp_path)


# ------------------------------------------------------------------------------------------------- how it is loaded


@pytest.mark.parametrize("place", ["cpu", torch.device("cpu")])
def test_a_flow_is_loaded_to_a_device_given_in_any_way(place, tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    assert PreferenceFlow.from_pretrained(tmp_path, map_location=place).device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
@pytest.mark.parametrize("place", ["cuda", "cuda:1", 0, 1, torch.device("cuda:1"), "gpu", "", -1, "meta"])
def test_a_device_that_is_not_there_is_named(place, tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"map_location=.*use map_location='cpu'"):
        PreferenceFlow.from_pretrained(tmp_path, map_location=place)


@pytest.mark.parametrize("place", [None, True, 1.0, {"cuda:0": "cpu"}, lambda storage, place: storage])
def test_what_is_no_device_is_refused(place, tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="map_location must be a device"):
        PreferenceFlow.from_pretrained(tmp_path, map_location=place)


@pytest.mark.parametrize(
    ("option", "told"), [("revison", "'revision'"), ("mapLocation", "'map_location'"), ("x", "known are map_location")]
)
def test_misspelt_options_are_refused_by_name(option, told, tmp_path):
    flow_of(1.0).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=rf"no option '{option}': .*{told}"):
        PreferenceFlow.from_pretrained(tmp_path, **{option: True})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["no/such-flow", "nosuchflow", "./nosuchflow", "a/b/c", "~/nosuchflow", "", "a\\b"])
def test_a_misspelt_folder_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"give (a|one) "):
        PreferenceFlow.from_pretrained(name)


def test_pairs_of_a_fit_are_saved_by_the_same_rules(tmp_path):
    model = BradleyTerry().fit(EncodedPairs(torch.randn(40, 3) + 1, torch.randn(40, 3)))
    model.save(tmp_path)
    assert load(tmp_path).found == json.loads(json.dumps(model.found))


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden", 10**8), ("layers", 10**9), ("layers", 1), ("layers", "2"), ("hidden", -1), ("hidden", True),
     ("size", 10**12), ("horizon", 10**12)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_networks_whose_configuration_lies_are_refused(kind, name, value, tmp_path, bounded_memory):
    spaces = pytest.importorskip("gymnasium").spaces
    from pfm.pbrl import ClonedPolicy
    from pfm.pbrl.values import FittedValue

    path = tmp_path / "net.safetensors"
    made: Any = (
        ClonedPolicy(3, 2, spaces.Box(-1.0, 1.0, (2,)), hidden=4)
        if kind == "policy"
        else FittedValue(3, 0.9, hidden=4, layers=2)
    )
    if kind == "value":
        made.r2, made.rows, made.simulated = 0.5, 10, 10
    made.save(path)
    assert type(made).load(path).shape == made.shape
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    config = json.loads(meta["config"])
    name = "observation_size" if name == "size" and kind == "policy" else name
    if name not in config:
        pytest.skip("no such size")
    save_file(load_file(path), path, meta | {"config": json.dumps(config | {name: value})})
    with pytest.raises(ValueError, match=r"its (configuration|metadata)|does not fit its configuration"):
        type(made).load(path)


def test_a_disk_without_space_is_an_error_of_the_system_that_names_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    archive.save_tensors(path, {"weight": torch.ones(4)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            archive.save_tensors(path, {"weight": torch.ones(10_000)})
        with pytest.raises(OSError, match=r"large\.json"):
            replace_json(tmp_path / "large.json", "a" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]
