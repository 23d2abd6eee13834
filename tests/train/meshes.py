"""Small models on many meshes, in one process or several.

`python -m tests.train.meshes OUT SETTINGS [COORDINATOR PROCESSES PROCESS]` trains one run after the
other; SETTINGS is JSON, {folder in OUT: {"mesh": sizes, "rules": whether parameters lie along the
sequence too, and fields of the experiment}}, or {"recipe": …}. `$XLA_FLAGS` says how many devices a
process has.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.train.tiny import TinyConfig, TinyData, find_here, tiny, tiny_recipe
from zoo.models.base.llava import VARIANTS
from zoo.models.core import codec
from zoo.models.core.errors import ZooError
from zoo.train.mesh import ALONG_SEQUENCE, MeshConfig
from zoo.train.metrics import read_metrics
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig

STEPS, DEVICES = 20, 8

MESHES = {
    "data": {"mesh": {"data": 8}},
    "fsdp": {"mesh": {"data": 1, "fsdp": 8}},
    "tensor": {"mesh": {"data": 1, "tensor": 8}},
    "seq": {"mesh": {"data": 1, "seq": 8}},
    "expert": {"mesh": {"data": 1, "expert": 8}},
    "mixed": {"mesh": {"data": 1, "fsdp": 2, "tensor": 2, "seq": 2}},
    "ulysses": {"mesh": {"data": 1, "fsdp": 2, "seq": 4}, "rules": True},
}


def experiment(mesh, rules=False, small=False, data=None, **changes):
    """A LLaVA of a layer each, whose sequences have 40 tokens: 16 of a picture, and text.

    With `small` the tiny model, which has no attention and few parameters to send.
    """
    llava = VARIANTS["llava_tiny"]
    model = replace(
        llava,
        tower=replace(llava.tower, depth=1),
        vision_layer=-1,
        decoder=replace(llava.decoder, width=32, depth=1, num_heads=8, num_kv_heads=4, mlp_dim=64),
        text_tokens=25,
    )
    settings = {
        "model": TinyConfig() if small else model,
        "data": data or TinyData(),
        "objective": NextToken(chunk=16),
        "optim": OptimConfig(lr=1e-3, warmup=2),
        "steps": STEPS,
        "batch_size": 8,
        "save_every": STEPS,
        "keep": 1,
    }
    mesh = MeshConfig(**mesh, rules=ALONG_SEQUENCE if rules else ())
    return tiny(**{**settings, "mesh": mesh, **changes})


def flags(devices):
    """So many devices, and programs that are not optimised."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


def start(out, settings, devices=DEVICES, job=(), **env):
    """The process of a job with so many devices of its own; (coordinator, processes, process)."""
    command = [sys.executable, "-m", "tests.train.meshes", str(out), json.dumps(settings)]
    return subprocess.Popen(
        [*command, *map(str, job)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices), **env},
        stderr=subprocess.PIPE,
        text=True,
    )


def start_job(out, settings, processes=2, devices=DEVICES, start=start, **env):
    """The processes of a job, which share out so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    each = devices // processes
    return [start(out, settings, each, (where, processes, p), **env) for p in range(processes)]


class Forked:
    """As what `start` returns, of a process that does not have to import everything first."""

    _server = multiprocessing.get_context("forkserver")
    _server.set_forkserver_preload(["tests.train.preloaded"])

    def __init__(self, out, settings, devices, job, **env):
        self._said = Path(out) / f"stderr_{job[2]}"
        self._said.parent.mkdir(parents=True, exist_ok=True)
        arguments = (str(out), settings, devices, job, env, str(self._said))
        self._process = self._server.Process(target=_forked, args=arguments)
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def communicate(self, timeout=None):
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still there after {timeout} seconds"
        return "", self._said.read_text()


def _forked(out, settings, devices, job, env, said):
    os.environ.update(env)
    os.environ["XLA_FLAGS"] = flags(devices)
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    try:
        sys.exit(main(out, settings, job))
    except ZooError as error:
        sys.exit(f"zoo: {error}")


def finished(runs, seconds=300):
    """What the processes have said, after all have ended well."""
    said = [run.communicate(timeout=seconds)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(said)
    return said


def losses(out):
    """Step -> loss of a run, after a look at whether every step occurs once."""
    records = read_metrics(Path(out) / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return {r["step"]: r["loss"] for r in records}


def main(out, settings, job):
    from zoo.train.launch import join, one_of_several
    from zoo.train.loop import train
    from zoo.train.recipe import train_recipe

    if job:
        join(job[0], int(job[1]), int(job[2]))
    with one_of_several():
        for name, changes in settings.items():
            if name == "recipe":
                codec._find = find_here  # the second stage reads what the first has saved
                recipe = tiny_recipe(mesh=MeshConfig(**changes["mesh"]))
                train_recipe(recipe, Path(out) / name)
                continue
            bad = changes.pop("bad", -1)
            records = changes.pop("records", 40)
            share = {"max_bad_share": 0.1} if bad >= 0 else {}
            data = TinyData(records=records, bad=bad)
            result = train(experiment(**changes, **share, data=data), Path(out) / name)
            if result.stopped:
                return 128 + result.stopped
    return 0


if __name__ == "__main__":
    out, settings, *job = sys.argv[1:]
    try:
        sys.exit(main(out, json.loads(settings), job))
    except ZooError as error:
        sys.exit(f"zoo: {error}")
