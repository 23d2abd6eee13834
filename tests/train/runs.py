"""Runs in processes of their own, which the tests kill."""

import os
import subprocess
import sys
import time


def start(out, *settings, seconds_per_record=0.0):
    """`python -m tests.train.tiny` on one device."""
    command = [sys.executable, "-m", "tests.train.tiny", str(out), *settings]
    env = {**os.environ, "XLA_FLAGS": "", "SECONDS_PER_RECORD": str(seconds_per_record)}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def kill_at(run, steps, target, pause, patience=float("inf")):
    """Kill `run` `pause` seconds after `steps()` has reached `target`; whether it came to that,
    before the end of the run and of `patience` seconds.
    """
    began = time.monotonic()
    while run.poll() is None and time.monotonic() - began < patience:
        if steps() >= target:
            time.sleep(pause)
            run.kill()
            run.wait()
            return True
        time.sleep(0.005)
    return False
