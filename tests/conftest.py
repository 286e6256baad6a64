"""Settings of all tests: no network, one thread a worker (workers share the cores)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Keep tests that share what is fitted once for a module on one worker: elsewhere it would be fitted again."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs
        if any(fixture.scope == "module" for named in fixtures.values() for fixture in named):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
