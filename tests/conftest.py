"""What all tests share: eight CPU devices, a cache of compiled programs, the root of the tree."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Before anything imports JAX. Everything may be overridden from outside (JAX_PLATFORMS=cuda).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute, so XLA is told not to optimise.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the source tree."""
    return REPO
