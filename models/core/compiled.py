"""`jax.jit` with what XLA should know of the machine at hand."""

import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options of XLA for programs that run many times: `jax.jit(f, compiler_options=...)`.

    On a CPU, matrix products go to XLA's older kernels and only sums and maxima to its newer ones
    (YNN), and vectors are as wide as the processor has them: in the forward pass of a model faster
    than XLA's own choice (`benchmarks/speed.py`). A version of XLA that does not know these options
    makes that choice. Elsewhere there is nothing to say.
    """
    if jax.default_backend() != "cpu":
        return {}
    wanted = {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
        "xla_cpu_prefer_vector_width": "512",
    }
    try:
        jax.jit(lambda: 0, compiler_options=wanted).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return wanted


def quick_options() -> dict[str, str]:
    """The same for programs that run once: on a CPU, compiling them takes longer than running, and
    nothing is optimised.
    """
    return {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else {}


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`jax.jit` with `compiler_options`, also as a decorator of a module's functions; what it
    returns has `eval_shape` too.

    The devices are looked at in the first call, and not when the module is imported. Such a program
    cannot be part of another one, which JAX refuses.
    """
    if function is None:
        return functools.partial(jit, **options)

    @functools.cache
    def program() -> Any:
        return jax.jit(function, compiler_options=compiler_options(), **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return program()(*args, **kwargs)

    def eval_shape(*args: Any, **kwargs: Any) -> Any:
        return program().eval_shape(*args, **kwargs)

    call.eval_shape = eval_shape  # type: ignore[attr-defined]
    return call
