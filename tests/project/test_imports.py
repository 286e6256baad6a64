"""What importing costs, and that every public name is there."""

import importlib.util
import re
import subprocess
import sys

import pytest
from support.places import ROOT

import pfm
from pfm._internal.moved import MOVED

HEAVY = ("sentence_transformers", "openai", "matplotlib", "datasets", "pyarrow", "torchdiffeq", "transformers", "scipy")


def loaded_after(code: str) -> set[str]:
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in found.stdout.split()}


def test_import_alone_does_not_wait_for_torch():
    assert "torch" not in loaded_after("import pfm")


def test_using_every_name_loads_nothing_heavy():
    assert not loaded_after("from pfm import *") & set(HEAVY)


@pytest.mark.parametrize("name", pfm.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(pfm, name).__doc__
    assert name in dir(pfm)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PreferenceFlows'"):
        pfm.PreferenceFlows  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("old", "new"), [("pfm.config", "pfm.flow.config"), ("pfm.preferences.votes", "pfm.data.votes")]
)
def test_an_old_path_warns_and_gives_the_module_at_its_new_one(old, new):
    code = f"import {old}, {new}, sys; assert sys.modules[{old!r}] is sys.modules[{new!r}]; print({old}.__name__)"
    found = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == new
    assert f"<string>:1: DeprecationWarning: {old} is now {new}" in found.stderr


def test_every_old_path_leads_to_a_module():
    assert all(importlib.util.find_spec(new) for new in MOVED.values())


def test_an_old_method_warns_in_its_callers_file_and_gives_the_same():
    pairs = pfm.PreferencePairs.from_rows([{"prompt": "Why?", "chosen": "It rains.", "rejected": "No."}])
    renamed = r"PreferencePairs\.describe\(\) is now PreferencePairs\.summary\(\)"
    with pytest.warns(DeprecationWarning, match=renamed) as seen:
        assert pairs.describe() == pairs.summary()
    assert seen[0].filename == __file__


def test_the_tests_of_the_library_do_not_need_the_benchmarks():
    tests = ROOT / "tests"
    outside = [path for path in tests.rglob("test_*.py") if path.parent.name not in ("benchmarks", "project")]
    assert len(outside) > 50
    assert not [path for path in outside if re.search(r"^\s*(from|import) benchmarks\b", path.read_text("utf-8"), re.M)]
