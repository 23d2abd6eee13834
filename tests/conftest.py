"""What all tests share: eight CPU devices, a cache of compiled programs, the root of the tree."""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Before anything imports JAX. Everything may be overridden from outside (JAX_PLATFORMS=cuda).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute, so XLA is told not to optimise.
QUICK = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # XLA ends a process that gives it a flag unknown to it
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the source tree."""
    return REPO


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """After a module, let go of compiled programs where there are very many.

    Each of them maps pieces of memory, of which Linux gives a process 65,530; the next program
    after that ends the process.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        sys.modules["jax"].clear_caches()
