"""What all tests share: one BLAS thread, one of torch on demand, property tests that bear with a busy machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from hypothesis import HealthCheck, settings  # noqa: E402 - NumPy reads the variables above when it is imported

settings.register_profile(
    "dlion",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("dlion")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch adds up in one thread: always in the same order."""
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
