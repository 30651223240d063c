"""Shared settings: derandomised Hypothesis in CI, one thread, no global state between tests."""

import os
import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by a shell, in what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the processes that tests start must hear it

torch.set_num_threads(1)  # tests run beside each other; threads that wait for each other crawl


@pytest.fixture
def device():
    """The CPU, or what GRADREG_TEST_DEVICE names."""
    return torch.device(os.environ.get("GRADREG_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def _own_generator_state():
    """Tests neither see nor change torch's global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
