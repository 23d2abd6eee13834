"""What the scripts tell `gcloud`; here a program of that name writes it down."""

import json
import os
import shutil
import subprocess

import pytest

GCLOUD = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["TOLD"], "a") as out:
    out.write(json.dumps(sys.argv[1:]) + chr(10))
"""


@pytest.fixture
def tpu(tmp_path, repo):
    """Runs `scripts/tpu ...`; returns its exit status, what it said, and what gcloud was told."""
    fake = tmp_path / "bin" / "gcloud"
    fake.parent.mkdir()
    fake.write_text(GCLOUD)
    fake.chmod(0o755)
    told = tmp_path / "told"

    def run(*arguments, **env):
        told.write_text("")
        where = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "TOLD": str(told)}
        env = {**os.environ, **where, "TPU_NAME": "mine", "ZONE": "us-central1-a", **env}
        done = subprocess.run(
            [repo / "scripts" / "tpu", *arguments],
            env={name: value for name, value in env.items() if value is not None},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [json.loads(line) for line in told.read_text().splitlines()]
        return done.returncode, done.stdout + done.stderr, lines

    return run


VM = ["compute", "tpus", "tpu-vm"]


def test_slices_are_made_and_deleted(tpu):
    status, said, told = tpu("create", "v5litepod-16", "v2-alpha-tpuv5-lite", "--spot")
    assert status == 0, said
    kind = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
    assert told == [[*VM, "create", "mine", *kind, "--zone=us-central1-a"]]
    _, _, told = tpu("delete", PROJECT="p")
    assert told == [[*VM, "delete", "mine", "--zone=us-central1-a", "--project=p"]]


def test_training_starts_on_all_hosts_with_the_flags_as_they_are(tpu, tmp_path):
    status, said, (told,) = tpu("train", "mine.py", "--out", "/mnt/a folder", "--optim.lr", "1e-5")
    assert status == 0, said
    assert told[:5] == [*VM, "ssh", "mine"]
    assert "--worker=all" in told
    command = next(t for t in told if t.startswith("--command=")).removeprefix("--command=")
    # What would run there, in a home of its own whose `zoo` writes down its arguments.
    zoo = tmp_path / "zoo-venv" / "bin" / "zoo"
    zoo.parent.mkdir(parents=True)
    zoo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    zoo.chmod(0o755)
    home = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", f"{command}\nwait"], env=home, check=True)
    wanted = ["train", "mine.py", "--out", "/mnt/a folder", "--optim.lr", "1e-5"]
    assert (tmp_path / "zoo.log").read_text().splitlines() == wanted
    (tmp_path / "zoo.pid").write_text(str(os.getpid()))
    again = subprocess.run(
        ["bash", "-c", command], env=home, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "is running here" in again.stderr


def test_this_tree_is_installed(tpu):
    if shutil.which("git") is None:
        pytest.skip("no git")
    status, said, told = tpu("install")
    assert status == 0, said
    assert [line[3] for line in told] == ["scp", "ssh"]
    assert told[0][5] == "mine:zoo.tar.gz"
    assert any("zoo[tpu]" in word for word in told[1])


@pytest.mark.parametrize(("arguments", "worker"), [((), "0"), (("3",), "3")])
def test_logs_are_of_one_host(tpu, arguments, worker):
    _, _, (told,) = tpu("logs", *arguments)
    assert f"--worker={worker}" in told


def test_mistakes_are_explained(tpu):
    assert tpu("create", "v5litepod-16")[:2] == (
        2,
        "tpu: create wants a type and a runtime: create v5litepod-16 v2-alpha-tpuv5-lite\n",
    )
    status, said, told = tpu("destroy")
    assert (status, told) == (2, [])
    assert "destroy is none of create" in said
    status, said, _ = tpu("stop", ZONE=None)
    assert status != 0
    assert "want ZONE" in said
    status, said, _ = tpu("--help")
    assert status == 0
    assert said.startswith("Trains on a slice") and "set -euo" not in said
