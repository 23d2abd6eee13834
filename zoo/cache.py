"""What outlives a run on this machine: prepared data sets and compiled programs."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """`zoo` in the user's cache folder: `$XDG_CACHE_HOME`, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo"


def keep_compiled_programs() -> None:
    """Let JAX store compiled programs in the user's cache folder: the next run starts sooner.

    `$JAX_COMPILATION_CACHE_DIR` chooses another folder, `JAX_ENABLE_COMPILATION_CACHE=false` none.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
