import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.train.runs import kill_at, start
from tests.train.tiny import TinyConfig, TinyData, tiny
from zoo.models.core.errors import UsageError, ZooError
from zoo.train.cli import find
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig
from zoo.train.metrics import read_metrics
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig


def losses(out):
    """Step -> (loss, gradient norm), after a look at whether every step occurs once."""
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records}


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Losses of a whole run on one device."""
    out = tmp_path_factory.mktemp("whole")
    run = start(out)
    assert run.wait() == 0, run.stderr.read()
    found = losses(out)
    assert len(found) == 12
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder and the result of a whole run on eight devices, with evaluation."""
    seen = []

    def on_eval(model, params, step):
        seen.append((step, float(np.asarray(params["norm"]["scale"]).sum())))
        return {"mine": 1.0 / step}

    out = tmp_path_factory.mktemp("done") / "new" / "run"
    experiment = tiny(eval_every=5, eval_examples=20, log_every=4)
    result = train(experiment, out, on_eval=on_eval)
    return out, experiment, result, seen


def test_a_run_leaves_what_it_should(done):
    out, _, result, seen = done
    assert result.complete
    assert result.stopped is None
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records] == [4, 5, 8, 10, 12]
    assert [r["step"] for r in records if "mine" in r] == [5, 10, 12] == [s for s, _ in seen]
    assert all(np.isfinite(r["loss"]) and r["lr"] >= 0 for r in records)
    assert records[-1] == {"step": 12, **result.metrics}
    assert {"eval/loss", "eval/accuracy", "accuracy", "grad_norm"} <= set(records[-1])
    assert json.loads((out / "config.json").read_text())["name"] == "tiny"
    log = (out / "train.log").read_text()
    assert "up/kernel  (8, 32)  P()" in log
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [
            ".lock",
            "checkpoints",
            "config.json",
            "metrics.jsonl",
            "model",
            "processor",
            "tensorboard",
            "train.log",
        ]
    )


def test_a_complete_run_is_not_run_again(done, capsys):
    out, experiment, result, _ = done
    before = (out / "metrics.jsonl").read_bytes()
    again = train(experiment, out)
    assert again.complete
    np.testing.assert_array_equal(again.params["embedding"], result.params["embedding"])
    assert (out / "metrics.jsonl").read_bytes() == before
    assert "step 12 of 12 restored, complete" in capsys.readouterr().err


def test_another_configuration_is_refused(done):
    out, experiment, _, _ = done
    before = (out / "config.json").read_bytes()
    with pytest.raises(UsageError, match="seed: 0 → 9"):
        train(replace(experiment, seed=9), out)
    assert (out / "config.json").read_bytes() == before


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_do_what_one_does(uninterrupted, tmp_path, mesh):
    train(tiny(mesh=MeshConfig(**mesh)), tmp_path)
    found = losses(tmp_path)
    assert found.keys() == uninterrupted.keys()
    for step, numbers in uninterrupted.items():
        np.testing.assert_allclose(found[step], numbers, rtol=1e-6, atol=1e-5)


def test_killed_at_any_moment_it_continues_with_the_same_losses(uninterrupted, tmp_path):
    def steps():
        return len(read_metrics(tmp_path / "metrics.jsonl"))

    rng, kills = random.Random(time.time_ns()), 0
    for _ in range(3):
        run = start(
            tmp_path, seconds_per_record=0.01
        )  # two threads: 40 ms for the records of a step
        target = min(steps() + rng.randint(1, 5), 11)
        kills += kill_at(run, steps, target, rng.uniform(0, 0.2), patience=60)
        found = losses(tmp_path)
        assert all(uninterrupted[step] == numbers for step, numbers in found.items())
    assert kills
    run = start(tmp_path)
    assert run.wait() == 0, run.stderr.read()
    assert losses(tmp_path) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_where(uninterrupted, tmp_path, number, capsys):
    def interrupt(model, params, step):
        os.kill(os.getpid(), number)
        return {}

    before = signal.getsignal(number)
    stopped = train(
        tiny(eval_every=6, mesh=MeshConfig(fsdp=8, data=1)), tmp_path, on_eval=interrupt
    )
    assert (stopped.stopped, stopped.step, stopped.complete) == (number, 6, False)
    said = capsys.readouterr().err
    assert f"stopped by {number.name} after step 6 of 12: saved {tmp_path}/checkpoints/6" in said
    assert signal.getsignal(number) is before
    resumed = train(tiny(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path)
    assert resumed.complete
    for step, numbers in losses(tmp_path).items():
        np.testing.assert_allclose(numbers, uninterrupted[step], rtol=1e-6, atol=1e-5)


def test_the_command_ends_with_the_status_of_the_signal(tmp_path):
    run = start(tmp_path, "steps=4000", seconds_per_record=0.02)
    while not read_metrics(tmp_path / "metrics.jsonl") and run.poll() is None:
        time.sleep(0.02)
    run.terminate()
    status, said = run.wait(), run.stderr.read()
    assert status == 143, said
    assert "stopped by SIGTERM" in said


def test_a_number_that_is_not_finite_stops_the_run(tmp_path):
    wild = OptimConfig(lr=1e15, warmup=0, clip_norm=None, schedule="constant")
    experiment = tiny(optim=wild, objective=NextToken(), save_every=1, log_every=5)
    with pytest.raises(ZooError) as failed:
        train(experiment, tmp_path)
    said = str(failed.value)
    step = int(said.split(":")[0].removeprefix("step "))
    assert step > 1
    for part in ("embedding", "up", "down", "norm"):
        assert f"{part} " in said
    assert "nan" not in said
    assert f"the last good checkpoint is {tmp_path}/checkpoints/{step - 1}." in said
    assert not (tmp_path / "checkpoints" / str(step)).exists()
    with pytest.raises(ZooError, match=f"step {step}: "):
        train(experiment, tmp_path)


def test_bad_records_are_reported(tmp_path, capsys):
    experiment = tiny(data=TinyData(bad=7), max_bad_share=0.1)
    result = train(experiment, tmp_path)
    assert result.complete
    assert "record 7 is broken" in capsys.readouterr().err
    counts = [
        r["bad_records"] for r in read_metrics(tmp_path / "metrics.jsonl") if "bad_records" in r
    ]
    assert counts[0] == 1
    with pytest.raises(ZooError, match="record 7 is broken"):
        train(replace(experiment, max_bad_share=0.001), tmp_path / "strict")


def test_what_cannot_work_is_said_before_time_is_spent(tmp_path):
    cases = {
        "multiple of 8": tiny(batch_size=12),
        "want at most the 12 steps": tiny(optim=OptimConfig(warmup=20)),
        "tokens and the model knows 320": tiny(processor=replace(tiny().processor, vocab_size=400)),
        "bytes? left|MB left": tiny(model=TinyConfig(width=8), keep=10**12),
    }
    for message, experiment in cases.items():
        if "knows" in message:
            experiment = replace(experiment, data=ManyWords())
        with pytest.raises(ZooError, match=message):
            train(experiment, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


class ManyWords(TinyData):
    def texts(self):
        return [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" * 3 for i in range(300)]


def test_the_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "from zoo.train.stop import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.signal is signal.SIGINT\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM


@pytest.mark.slow  # to compile, not to run
def test_the_tiny_configuration_trains_and_resumes(tmp_path):
    experiment = replace(
        find("digits_vqa_tiny"), objective=NextToken(budgets=(2,)), eval_examples=0
    )

    def crash(model, params, step):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(
            replace(experiment, eval_every=5), tmp_path, data_dir=tmp_path / "data", on_eval=crash
        )
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    result = train(experiment, tmp_path, data_dir=tmp_path / "data")
    assert result.complete
    found = losses(tmp_path)
    assert found[12][0] < found[1][0]
