"""Where the tests of this folder run: on a CUDA device; without one they are skipped.

With ``HF_PRECOND_TEST_DEVICE=cpu`` in the environment their bodies run on the CPU, as far as it
has what they need, for whoever changes them without a GPU.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """The device under test."""
    chosen = torch.device(os.environ.get("HF_PRECOND_TEST_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return chosen


@pytest.fixture
def cuda(device):
    """The device under test, where the test says nothing on any other."""
    if device.type != "cuda":
        pytest.skip("says nothing without a CUDA device")
    return device
