"""What importing costs, and that every public name is there."""

import subprocess
import sys

import pytest

import pfm

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
