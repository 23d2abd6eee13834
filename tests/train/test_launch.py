"""Several processes do what one does, stop together, and lose nothing when one of them dies."""

import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from tests.train.meshes import MESHES, STEPS, Forked, experiment, finished, losses, start, start_job
from zoo.cli import main
from zoo.models.core.errors import UsageError
from zoo.models.core.names import spec_for, use_rules
from zoo.train import launch
from zoo.train.data.share import share_of
from zoo.train.loop import Result
from zoo.train.mesh import (
    ALONG_SEQUENCE,
    AxisRule,
    MeshConfig,
    barely_sharded,
    batch_sharding,
    batch_share,
    check_batch_size,
    make_mesh,
)
from zoo.train.metrics import read_metrics
from zoo.train.setup import Setup

SLOW = {"SECONDS_PER_RECORD": "0.02"}


def close(found, wanted):
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(
        [found[step] for step in wanted], list(wanted.values()), rtol=0, atol=1e-5
    )


JUDGED = {"bad": 7, "eval_every": 10, "eval_examples": 16}
"""Of a run that meets a bad record and is judged."""


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Losses of one device, and of one device whose run is `JUDGED`."""
    out = tmp_path_factory.mktemp("alone")
    finished([start(out, {"one": {"mesh": {}}, "bad": {"mesh": {}, **JUDGED}}, devices=1)])
    assert len(losses(out / "one")) == STEPS
    found = {name: losses(out / name) for name in ("one", "bad")}
    return {**found, "judged": judged(out / "bad")}


def judged(out):
    found = {r["step"]: r.get("eval/loss") for r in read_metrics(out / "metrics.jsonl")}
    assert [step for step, loss in found.items() if loss] == [10, 20]
    return {step: loss for step, loss in found.items() if loss}


@pytest.mark.thorough
@pytest.mark.parametrize("processes", [1, 2])
def test_every_mesh_gives_the_losses_of_one_device(alone, tmp_path, processes):
    settings = {**MESHES, "bad": {"mesh": {"data": 4, "fsdp": 2}, **JUDGED}}
    finished(start_job(tmp_path, settings, processes), seconds=900)
    for name in settings:
        close(losses(tmp_path / name), alone["bad" if name == "bad" else "one"])
    close(judged(tmp_path / "bad"), alone["judged"])
    counted = [r.get("bad_records") for r in read_metrics(tmp_path / "bad" / "metrics.jsonl")]
    assert max(filter(None, counted)) == 4  # one in each of 160 / 40 epochs
    assert (tmp_path / "data" / "model" / "params.safetensors").is_file()
    for line in ("up/kernel", "step 20 of 20"):
        log = (tmp_path / "fsdp" / "train.log").read_text()
        assert log.count(line) <= 3  # written by one process


PAIR = {"run": {"mesh": {"fsdp": 2}, "save_every": 4, "keep": 2, "small": True}}


def start_pair(out, **env):
    """Two processes of a device each."""
    return start_job(out, PAIR, 2, 2, start=Forked, **env)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Losses of two processes that nobody disturbs, bit by bit those of any other two."""
    out = tmp_path_factory.mktemp("pair")
    finished(start_pair(out))
    return losses(out / "run")


def steps_of(out):
    return len(read_metrics(out / "run" / "metrics.jsonl"))


def kill_one(out, rng, patience=240):
    """Kill one of two processes at some step; seconds until the other ended, and what it said."""
    runs = start_pair(out, **SLOW)
    begun, target = time.monotonic(), steps_of(out) + rng.randint(1, 6)
    while steps_of(out) < min(target, STEPS - 2) and all(run.poll() is None for run in runs):
        assert time.monotonic() - begun < patience
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    assert all(run.poll() is None for run in runs), [run.communicate() for run in runs]
    victim = rng.randrange(2)
    runs[victim].kill()
    killed = time.monotonic()
    said = runs[1 - victim].communicate(timeout=90)[1]
    seconds = time.monotonic() - killed
    runs[victim].communicate()
    return seconds, runs[1 - victim].returncode, said


@pytest.mark.thorough
@pytest.mark.parametrize("kills", [2])
def test_killed_at_any_step_the_job_ends_and_continues_bit_by_bit(pair, tmp_path, kills):
    rng = random.Random(time.time_ns())
    for _ in range(kills):
        seconds, status, said = kill_one(tmp_path, rng)
        assert seconds < 60
        assert status not in (0, None), said
        assert "another one is gone" in said or "distributed service" in said, said
        found = losses(tmp_path / "run")
        assert all(pair[step] == loss for step, loss in found.items())
    finished(start_pair(tmp_path))
    assert losses(tmp_path / "run") == pair


@pytest.mark.slow
def test_a_checkpoint_fits_other_devices_and_other_numbers_of_processes(alone, tmp_path):
    """Eight devices of two processes, then two of one, then four of two."""

    def run(mesh, devices, processes, **env):
        settings = {"run": {"mesh": mesh, "save_every": 4}}
        return start_job(tmp_path, settings, processes, devices, **env)

    def stopped(runs, step):
        while steps_of(tmp_path) < step and all(run.poll() is None for run in runs):
            time.sleep(0.01)
        runs[-1].send_signal(signal.SIGTERM)  # one hears of it, all save
        said = [run.communicate(timeout=120)[1] for run in runs]
        assert {run.returncode for run in runs} == {128 + signal.SIGTERM}, said
        assert "stopped by SIGTERM" in said[0]
        assert step <= steps_of(tmp_path) < STEPS
        return steps_of(tmp_path)

    at = stopped(run({"data": 2, "fsdp": 4}, 8, 2, **SLOW), 3)
    stopped(run({"data": 1, "tensor": 2}, 2, 1, **SLOW), at + 3)
    finished(run({"data": 1, "fsdp": 4}, 4, 2))
    close(losses(tmp_path / "run"), alone["one"])


@pytest.mark.thorough
def test_a_recipe_starts_from_what_several_processes_have_saved(tmp_path):
    for processes in (1, 2):
        settings = {"recipe": {"mesh": {"fsdp": processes}}}
        out = tmp_path / str(processes)
        finished(start_job(out, settings, processes, processes, start=Forked))
    one, two = tmp_path / "1" / "recipe", tmp_path / "2" / "recipe"
    for stage in ("1_align", "2_instruct"):
        close(losses(two / stage), losses(one / stage))
    params = [load_file(run / "model" / "params.safetensors") for run in (one, two)]
    assert params[0].keys() == params[1].keys()
    for name, wanted in params[0].items():
        np.testing.assert_allclose(params[1][name], wanted, atol=1e-4, err_msg=name)


def test_shares_cut_a_batch_into_parts():
    assert share_of(1, [(0, 1), (2, 3)]) == (1, 2, (2, 3))
    assert share_of(1, [(0, 1), (1, 0)]) == (0, 1, (0, 1))
    assert share_of(2, [(0, 2), (1, 3), (3, 1), (2, 0)]) == (1, 2, (1, 3))
    with pytest.raises(UsageError, match="same examples"):
        share_of(0, [(0, 1), (1, 2), (2, 0)])
    sharding = batch_sharding(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    assert batch_share(sharding, 8) == (0, 1, tuple(range(8)))


def test_the_batch_is_divided_over_experts_too():
    mesh = make_mesh(MeshConfig(expert=4))
    check_batch_size(8, mesh)
    with pytest.raises(UsageError, match="multiple of 8, the mesh's data x fsdp x expert"):
        check_batch_size(12, mesh)


def test_rules_are_checked_and_in_force_only_where_they_should():
    mesh = AbstractMesh((2, 4), ("fsdp", "seq"))
    names, shape = ("embed", "mlp"), (16, 8)
    assert spec_for(names, shape, mesh) == PartitionSpec("fsdp")
    with MeshConfig(rules=ALONG_SEQUENCE).ruled():
        assert spec_for(names, shape, mesh) == PartitionSpec(("fsdp", "seq"))
        with use_rules({"mlp": "fsdp", "embed": None}):
            assert spec_for(names, shape, mesh) == PartitionSpec(None, "fsdp")
    assert spec_for(names, shape, mesh) == PartitionSpec("fsdp")
    with pytest.raises(UsageError, match="a rule for 'embd': nearest: embed"):
        MeshConfig(rules=(AxisRule("embd", ("fsdp",)),))
    with pytest.raises(UsageError, match="embed -> model: want axes of data, fsdp"):
        MeshConfig(rules=(AxisRule("embed", ("model",)),))
    with pytest.raises(ValueError, match="used twice"), use_rules({"mlp": "fsdp"}):
        spec_for(names, shape, mesh)


def test_a_warning_where_little_is_divided():
    setup = Setup.of(experiment({}))
    mesh = make_mesh(MeshConfig(fsdp=8, data=1))
    assert barely_sharded(setup.state(mesh).params) is None
    with MeshConfig(rules=(AxisRule("vocab"),)).ruled():
        said = barely_sharded(setup.state(mesh).params)
    assert "decoder/embedding/embedding" in said and "% of the parameters" in said
    with MeshConfig(rules=(AxisRule("vocab"),)).ruled():
        assert barely_sharded(setup.state(make_mesh(MeshConfig())).params) is None
    whole = NamedSharding(mesh, PartitionSpec())
    assert "0%" in barely_sharded({"a": jax.ShapeDtypeStruct((8,), float, sharding=whole)})


def test_flags_that_make_no_job_are_refused(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    launch.join()  # there is no cluster: nothing happens
    launch.join("10.0.0.1:1234", 1, 0)
    assert jax.process_count() == 1
    cases = {
        "--num-processes, --process-id missing": ("10.0.0.1:1234", None, None),
        "want host:port": ("10.0.0.1", 2, 0),
        "--process-id is 2 of --num-processes 2: want 0 to 1": ("10.0.0.1:1234", 2, 2),
    }
    for message, given in cases.items():
        with pytest.raises(UsageError, match=message):
            launch.join(*given)


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
        ({"SLURM_NTASKS": "8"}, None),  # of the batch script itself, outside of srun
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            {"local_device_ids": []},
        ),
        (
            {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            {},
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, {}),
    ],
)
def test_launchers_are_told_apart(monkeypatch, env, settings):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launch._found() == settings


def test_an_open_mpi_that_says_too_little_is_explained(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    with pytest.raises(UsageError, match="--process-id \\$OMPI_COMM_WORLD_RANK"):
        launch._found()


def test_a_process_by_itself_is_its_own_job(tmp_path):
    assert launch.is_first()
    assert launch.gathered({"a": 1}) == [{"a": 1}]
    assert launch.first(lambda: 3) == launch.made_once(lambda: 3) == 3
    with launch.locked_together(tmp_path / "new") as folder:
        assert folder == tmp_path / "new"
    assert [p.name for p in folder.iterdir()] == [".lock"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"), launch.lost_processes():
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: nothing of ours")


def test_every_command_of_the_page_is_understood(repo, tmp_path, monkeypatch):
    """What `zoo train` and `scripts/tpu train` are given there."""
    calls, joined = [], []

    def train(config, out, *, data_dir):
        calls.append(config)
        return Result(Path(out), 1, 1, {}, None, None, None)

    monkeypatch.setattr("zoo.train.loop.train", train)
    monkeypatch.setattr("zoo.train.recipe.train_recipe", train)
    monkeypatch.setattr("zoo.train.launch.join", lambda *given: joined.append(given))
    page = (repo / "docs" / "launch.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
    found = re.findall(r"(?:zoo|scripts/tpu) (train [^'\n]+)", code)
    for line in found:
        assert main(shlex.split(re.sub(r"\$OMPI_\w+", "1", line))) == 0, line
    assert len(found) == 9
    assert [given for given in joined if given != (None,) * 3] == [
        ("host0:8476", 1, 1), ("10.0.0.1:8476", 2, 0), ("10.0.0.1:8476", 2, 1)
    ]  # fmt: skip
    assert {config.mesh.fsdp for config in calls[1:]} == {4, 8, 16, 32}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        exec(block, {})
    assert blocks


if __name__ == "__main__":  # N kills in a row: python -m tests.train.test_launch 20 FOLDER
    number, folder = int(sys.argv[1]), Path(sys.argv[2])
    finished(start_pair(folder / "whole"))
    wanted, draws, slowest = losses(folder / "whole" / "run"), random.Random(0), 0.0
    for kill in range(number):
        took, code, text = kill_one(folder / "killed", draws)
        slowest = max(slowest, took)
        known = losses(folder / "killed" / "run")
        assert all(wanted[step] == loss for step, loss in known.items())
        last = text.strip().splitlines()[-1]
        print(f"kill {kill + 1}: step {len(known)}, other one {code} after {took:.1f} s: {last}")
        if len(known) >= STEPS - 3:
            subprocess.run(["rm", "-r", str(folder / "killed")], check=True)
    finished(start_pair(folder / "killed"))
    assert losses(folder / "killed" / "run") == wanted
    print(f"{number} kills lost nothing; the other process ended within {slowest:.1f} s")
