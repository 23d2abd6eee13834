"""How large and how fast image models are: parameters, FLOPs, activations, images per second and
memory, measured on the devices that are there.

    zoo bench-vision swin_t inceptionnext_t --batch 8 --plot speed.png

Weights are random: speed does not depend on them. The model computes in `--dtype`; what is timed is
one compiled forward pass, of which the median counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.costing import cost
from zoo.models.core import registry
from zoo.models.core.config import ModelConfig, with_dtype
from zoo.models.core.errors import UsageError


@dataclass(frozen=True)
class Speed:
    """What was found of one model.

    Attributes:
      model: its name.
      params: number of parameters.
      gflops: FLOPs of one image, in units of 10^9; a multiplication with its addition is two.
      activation_mib: of one image, at most, if the compiler fuses nothing.
      compile_seconds: until the first result.
      images_per_second: by the median of the runs.
      peak_mib: memory of the compiled program: weights, images, results and what lies between.
    """

    model: str
    params: int
    gflops: float
    activation_mib: float
    compile_seconds: float
    images_per_second: float
    peak_mib: float


def measure(
    name: str, *, batch: int = 8, dtype: str = "float32", seconds: float = 2.0, **overrides: Any
) -> Speed:
    """Compile and time the forward pass of an image model.

    Args:
      name: one that `zoo.create` takes.
      batch: images at once.
      dtype: of activations and weights.
      seconds: how long it runs after the first time, five times at least.
      **overrides: settings of the model, as `zoo.create` takes them.

    Raises:
      UsageError: an unknown name, a batch without images, or a model that takes more than images.
    """
    if batch < 1 or seconds <= 0:
        raise UsageError(f"batch is {batch} and seconds {seconds}: want 1 or more, and more than 0")
    config = registry.config(name, **overrides)
    if not _sees_images(config):
        raise UsageError(f"{name} does not take images alone: want an image encoder or classifier")
    counted = cost(config, batch=1, dtype=dtype)
    config = with_dtype(config, dtype)
    model, rng = config.build(), np.random.default_rng(0)
    inputs = config.inputs(batch)
    made = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), inputs))

    def drawn(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        return jnp.asarray(values, dtype)

    variables = {
        kind: jax.tree.map(drawn if kind == "params" else lambda x: jnp.ones(x.shape), tree)
        for kind, tree in made.items()
    }
    images = {key: drawn(spec).astype(jnp.float32) for key, spec in inputs.items()}

    def run(variables: Any, images: Any) -> jax.Array:
        out = model.apply(variables, images)
        return out.pooled if out.logits is None else out.logits

    begin = time.perf_counter()
    compiled = jax.jit(run).lower(variables, images).compile()
    compiled(variables, images).block_until_ready()
    compiling, begin = time.perf_counter() - begin, time.perf_counter()
    times: list[float] = []
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        compiled(variables, images).block_until_ready()
        times.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return Speed(
        model=name,
        params=counted.params["total"],
        gflops=counted.flops["encode"].total / 1e9,
        activation_mib=counted.activation_bytes / 2**20,
        compile_seconds=compiling,
        images_per_second=batch / statistics.median(times),
        peak_mib=sum(getattr(memory, part, 0) for part in parts) / 2**20,
    )


def backbones() -> tuple[str, ...]:
    """Of each system the first variant that takes images alone and returns classes or features."""
    found = []
    for line in registry.listings(kind="vision-backbone"):
        fit = (name for name in line.variants if _sees_images(registry.config(name)))
        found += [name for name in (next(fit, None),) if name is not None]
    return tuple(found)


def _sees_images(config: Any) -> bool:
    if not isinstance(config, ModelConfig):
        return False
    inputs = config.inputs(1)
    return set(inputs) == {"pixels"} and inputs["pixels"].ndim == 4


def main(argv: Sequence[str]) -> int:
    """Run `zoo bench-vision`; prints a table or a list of JSON objects.

    Raises:
      UsageError: as `measure`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    parser = argparse.ArgumentParser(prog="zoo bench-vision", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all vision backbones")
    parser.add_argument("--batch", type=int, default=8, help="images at once (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="of weights and activations")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="write a scatter plot")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args = parser.parse_args(argv)
    if args.plot and not Path(args.plot).parent.is_dir():
        raise UsageError(f"--plot {args.plot}: there is no folder {Path(args.plot).parent}")
    found = []
    for name in args.names or backbones():
        found.append(measure(name, batch=args.batch, dtype=args.dtype, seconds=args.seconds))
        if not args.json:
            print(_line(found[-1]) if len(found) > 1 else f"{_HEADER}\n{_line(found[-1])}")
    if args.json:
        print(json.dumps([asdict(speed) for speed in found], indent=2))
    if args.plot:
        from zoo.plot import save, speed_figure

        points = [(s.model, s.gflops, s.images_per_second, s.params) for s in found]
        device = jax.devices()[0].device_kind
        title = f"Batch {args.batch}, {args.dtype}, {device}"
        save(speed_figure(points, title=title), Path(args.plot))
    return 0


_HEADER = (
    f"{'model':<24}{'parameters':>14}{'GFLOPs':>10}{'activations':>14}{'images/s':>11}"
    f"{'peak':>12}{'compiled in':>13}"
)


def _line(speed: Speed) -> str:
    return (
        f"{speed.model:<24}{speed.params:>14,}{speed.gflops:>10.2f}"
        f"{speed.activation_mib:>10.1f} MiB{speed.images_per_second:>11.1f}"
        f"{speed.peak_mib:>8.0f} MiB{speed.compile_seconds:>11.1f} s"
    )
