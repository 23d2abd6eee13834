"""Host memory that loading, converting and exporting a sharded checkpoint take at their peak.

    python benchmarks/load_memory.py [--gigabytes 3] [--json FILE]

Writes a random Llama in bfloat16 in shards, then does each in a process of its own on the CPU,
where the loaded parameters themselves lie in host memory. The peak is the kernel's VmHWM, pages of
mapped files included.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from zoo.convert.safetensors import write_header
from zoo.models.core.hf import Fields
from zoo.models.core.registry import base_of, read_hf

LIMIT = 1.2
"""Of the bytes of the checkpoint."""

WIDTH, MLP, VOCABULARY = 2048, 5632, 32_000
_SHARD_BYTES = 600_000_000

_JOBS = {
    "import": "import zoo.loading",
    "load": "import jax, zoo; jax.block_until_ready(zoo.load(sys.argv[1]).params)",
    "convert": "from zoo.convert.convert import convert; convert(*sys.argv[1:3])",
    "load converted": "import jax, zoo; jax.block_until_ready(zoo.load(sys.argv[2]).params)",
    "export": "from zoo.convert.export import export; export(*sys.argv[2:4])",
}
_PEAK = "print(*(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))"


def describe(depth: int) -> dict[str, Any]:
    """The `config.json` of a Llama of so many layers."""
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": depth,
        "num_attention_heads": WIDTH // 64,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a checkpoint of at least that size in shards and return the bytes of its tensors."""
    import flax.linen as nn

    from zoo.convert.place import abstract_params

    layer = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
    depth = int((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) // layer) + 1
    fields = describe(depth)
    config = read_hf(Fields("llama", fields))
    shapes = base_of("llama").table(config).shapes(nn.unbox(abstract_params(config)))
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 2 * int(np.prod(shape))
    dtype = np.dtype(ml_dtypes.bfloat16)
    homes = {}
    rng = np.random.default_rng(0)
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        with open(folder / file, "wb") as out:
            write_header(out, {name: (dtype, shapes[name]) for name in names})
            for name in names:
                bits = rng.integers(0x3C00, 0x3F80, shapes[name], np.uint16)  # numbers below 1
                out.write(bits.tobytes())
        homes |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (folder / "config.json").write_text(json.dumps(fields))
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def peak(job: str, *folders: Path) -> int:
    """Peak bytes of host memory of one job in a process of its own."""
    code = f"import sys\n{_JOBS[job]}\n{_PEAK}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(done.stdout) * 1024


def main() -> int:
    """Run all jobs, print a table; 1 if one takes more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, help="for files of three times that size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        theirs, ours, back = (Path(scratch) / name for name in ("theirs", "ours", "back"))
        theirs.mkdir()
        size = write_checkpoint(theirs, args.gigabytes)
        print(f"{'checkpoint':15} {size / 1e9:6.2f} GB", flush=True)
        peaks, ratios = {}, {}
        for job in _JOBS:
            peaks[job] = peak(job, theirs, ours, back)
            ratios[job] = round(peaks[job] / size, 3)
            print(f"{job:15} {peaks[job] / 1e9:6.2f} GB  {ratios[job]:.2f} of it", flush=True)
    if args.json:
        facts = {
            "checkpoint_bytes": size,
            "peak_bytes": peaks,
            "ratio": ratios,
            "limit": LIMIT,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "versions": {
                name: version(name) for name in ("jax", "flax", "numpy", "orbax-checkpoint")
            }
            | {"python": platform.python_version()},
        }
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return int(max(ratios.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
