import io
import json
import struct
import time

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from zoo.train.metrics import Journal, MetricsWriter, read_metrics
from zoo.train.progress import Bar


def events(folder):
    """All TensorBoard events, read by the definition of the record format."""
    for file in sorted((folder / "tensorboard").iterdir()):
        raw = file.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            yield Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]


def test_lines_after_the_restored_step_are_replaced(tmp_path):
    metrics = MetricsWriter(tmp_path, 0)
    for step in range(1, 7):
        metrics.write(step, {"loss": step / 3})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # killed while writing

    metrics = MetricsWriter(tmp_path, 4)
    metrics.write(5, {"loss": float("nan"), "eval/loss": 1.0})
    metrics.sync()
    metrics.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert records[3]["loss"] == 4 / 3
    assert records[4] == {"step": 5, "loss": None, "eval/loss": 1.0}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)

    found = list(events(tmp_path))
    assert [e.step for e in found if e.HasField("session_log")] == [1, 5]
    assert [e.step for e in found if e.HasField("summary")] == [1, 2, 3, 4, 5, 6, 5, 5]
    assert found[-1].summary.value[0].tag == "eval/loss"


def test_a_torn_line_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\n7\n{"loss": 1}\n{"step": 2')
    assert read_metrics(file) == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "none") == []


def test_the_journal_tells_and_notes(tmp_path):
    told = []
    journal = Journal(tmp_path / "train.log", told.append)
    journal.say("both")
    journal.note("file")
    journal.close()
    assert told == ["both"]
    assert [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()] == [
        "both",
        "file",
    ]


def test_without_a_terminal_there_are_lines_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=False)) as bar:
        bar.phase("training", 100, 10)
        for done in range(11, 41):
            now[0] += 1
            bar.update(done, loss="2.5")
    lines = out.getvalue().splitlines()
    assert lines == [
        f"training {n}/100  loss 2.5  1.00/s  00:01:{100 - n - 60:02} left" if n < 41 else ""
        for n in (20, 30, 40)
    ]


@pytest.mark.parametrize("shown", [{"loss": "1.5"}, {}])
def test_on_a_terminal_there_is_one_bar(shown):
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=100)) as bar:
        bar.phase("preparing", 4)
        bar.update(4)
        bar.phase("training", 10)
        bar.update(10, **shown)
        bar.say("[said] as it is")
    text = out.getvalue()
    assert "training" in text
    assert "10/10" in text
    assert "[said] as it is" in text
    assert ("loss 1.5" in text) == bool(shown)
