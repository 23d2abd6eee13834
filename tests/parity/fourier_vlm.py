"""Fourier-VLM's compression against the official function."""

import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.connectors.fourier_vlm import compress, compress_by_fft, cosines


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our functions and the recorded tokens."""
    names = ("grid_h", "grid_w"), ("reserve_h", "reserve_w")
    grid, kept = (tuple(case.kwargs[name] for name in pair) for pair in names)
    x = case.inputs["features"]
    rows, columns = (cosines(size).astype(np.float32) for size in grid)
    field = x.reshape(len(x), *grid, -1)
    # Rounded to half precision, a value between two numbers falls as its last bits in float32 do.
    half = jnp.asarray(x, case.kwargs["dtype"].removeprefix("torch."))
    return {
        "dct2_coefficients": np.einsum("ky,lx,byxc->bckl", rows, columns, field),
        "compressed_float32": np.asarray(compress(jnp.asarray(x), grid, kept)),
        "compressed": np.asarray(compress_by_fft(half, grid, kept).astype(jnp.float32)),
    }
