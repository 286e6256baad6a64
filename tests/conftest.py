"""Settings of all tests: no network, one thread a worker (workers share the cores), and the device they run on.

``PFM_TEST_DEVICE=cuda`` (or ``far``, see ``support/far_device.py``) makes it the device that ``"auto"`` chooses, and to
which fitted preference models are moved: tests that know of one device then mix it with the CPU at every call.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

if device := os.environ.get("PFM_TEST_DEVICE"):
    os.environ["PFM_DEVICE"] = device
    if device == "far":
        from support import far_device

        far_device.install()
    from support.moved import move_fitted_models

    move_fitted_models(device)
