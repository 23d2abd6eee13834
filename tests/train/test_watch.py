"""Speed, profiles and what is sent elsewhere."""

import sys
import types
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.train.tiny import tiny
from zoo.models.core.errors import UsageError
from zoo.train import meter as meters
from zoo.train.config import Best, Watch
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.meter import Meter, peak_flops, peak_memory_bytes, step_flops
from zoo.train.metrics import read_metrics
from zoo.train.plan.topology import CHIPS


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_what_a_step_takes_is_told(monkeypatch):
    now, waited, asked = [100.0], [5.0], []
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])

    def flops(variant):
        asked.append(variant)
        return {None: 400, 2: 100}[variant]

    devices = [Device({"peak_bytes_in_use": n}) for n in (3, 9)] + [Device(None)]
    meter = Meter(8, 80, lambda: waited[0], flops, 1000.0, devices)
    for variant in (None, 2, 2, None, None):
        meter.step(variant)
    now[0], waited[0] = 110.0, 6.0
    found = meter.read()
    assert found.pop("peak_host_bytes") > 1e6
    assert found == {
        "step_seconds": 2.0,
        "steps_per_second": 0.5,
        "examples_per_second": 4.0,
        "tokens_per_second": 40.0,
        "data_wait": 0.1,
        "peak_memory_bytes": 9.0,
        "mfu": (3 * 400 + 2 * 100) / 10 / 1000,
    }
    meter.reset()
    meter.step(2)
    now[0] = 111.0
    assert meter.read()["mfu"] == 0.1
    assert sorted(asked, key=str) == [2, None]

    unknown = Meter(8, None, lambda: 0.0, flops, None, [Device(None)])
    unknown.step(None)
    now[0] = 112.0
    assert not {"mfu", "tokens_per_second", "peak_memory_bytes"} & set(unknown.read())
    assert peak_memory_bytes([]) is None


def test_devices_are_known_by_their_names():
    for kind, peak in {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12, "TPU v5 lite": CHIPS["v5e"].flops, "TPU v5p": CHIPS["v5p"].flops,
        "TPU v6 lite": CHIPS["v6e"].flops, "cpu": None,
    }.items():  # fmt: skip
        assert peak_flops(kind) == peak, kind


def test_flops_of_a_step_are_those_of_its_products():
    experiment = tiny(accumulate=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tokens = 8 * 24
    # up, down and head, forward and twice backward; nothing of a second pass over the parts.
    wanted = 3 * 2 * tokens * (8 * 32 + 32 * 8 + 8 * 320)
    assert step_flops(experiment, mesh, None) == wanted


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; what it was told."""
    told = types.SimpleNamespace(runs=[], metrics=[], finished=0)

    class Run:
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            told.metrics.append(values)

        def finish(self):
            told.finished += 1

    module = types.ModuleType("wandb")
    module.init = lambda **settings: told.runs.append(settings) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_metrics_profile_and_the_best_of_a_run(wandb, tmp_path):
    watch = Watch(wandb="zoo", profile_steps=(2, 3), peak_flops=1e12)
    experiment = tiny(
        watch=watch,
        best=Best(1, "score", largest=True),
        keep=1,
        save_every=2,
        eval_every=2,
        steps=8,
    )

    def on_eval(model, params, step):
        if step == 6 and not (tmp_path / "cut").exists():
            (tmp_path / "cut").touch()
            raise RuntimeError("power cut")
        return {"score": {4: 9.0}.get(step, 1.0)}

    with pytest.raises(RuntimeError, match="power cut"):
        train(experiment, tmp_path / "run", on_eval=on_eval)
    train(experiment, tmp_path / "run", on_eval=on_eval)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9))
    for record in records:
        assert 0 < record["mfu"] < 1
        np.testing.assert_allclose(
            record["step_seconds"] * record["steps_per_second"], 1, rtol=1e-6
        )
        np.testing.assert_allclose(record["tokens_per_second"] / record["examples_per_second"], 24)
    one, other = wandb.runs
    assert one["id"] == other["id"]
    assert (one["project"], one["resume"], one["config"]["steps"]) == ("zoo", "allow", 8)
    # Steps after the checkpoint come again.
    assert [values["step"] for values in wandb.metrics] == [*range(1, 6), *range(5, 9)]
    assert wandb.metrics[-1] == records[-1]
    assert wandb.finished == 2
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    steps = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert steps == {"4", "8"}


def test_without_the_package_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="wandb is not installed: pip install wandb"):
        train(replace(tiny(), watch=Watch(wandb="zoo")), tmp_path)


def test_settings_that_cannot_be_are_refused():
    for name, value in {"profile_steps": (3, 2), "peak_flops": 0.0}.items():
        with pytest.raises(UsageError, match=rf"watch\.{name} is"):
            Watch(**{name: value})
    with pytest.raises(UsageError, match=r"best\.number is -1"):
        Best(-1)
