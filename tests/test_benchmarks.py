"""The benchmarks run; what they say is another matter, and takes a quiet machine."""

import json

import numpy as np
import pytest

from benchmarks import figures, pillars, reduction
from benchmarks import input as reading


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["p_mod"])
def test_pillars_at_a_tiny_size(name, tmp_path, capsys):
    pillars.main(["--tiny", "--rounds", "1", "--only", name, "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["cores"] and found["versions"]["jax"]
    for part in ("prefill", "decoding", "answer", "training_step"):
        assert set(found[part]["seconds"]) == {"dense", name}
        assert all(seconds > 0 for seconds in found[part]["seconds"].values())
        assert found[part]["times_fewer_flops"]["dense"] == 1
        assert found[part]["times_fewer_flops"][name] > (1.005 if part == "decoding" else 1.05)
    read = found["decoding"]["bytes_read_per_step"]
    assert read[name] < read["dense"]


def test_what_is_to_be_expected_of_an_answer():
    """Two seconds of prefill shrink as the FLOPs do, one of decoding as the bytes."""

    def seconds(dense, other):
        return {kind: {"dense": dense, "x": other} for kind in ("seconds", "median_seconds")}

    times = {
        "prefill": seconds(2, 0.5),
        "decoding": seconds(1, 0.5),
        "training_step": seconds(1, 1),
    }
    flops = {phase: {"dense": 400, "x": 100} for phase in times}
    found = pillars.summary(times, flops, {"dense": 30, "x": 20})
    assert list(found) == ["prefill", "decoding", "answer", "training_step"]
    answer = found["answer"]
    assert answer["seconds"] == {"dense": 3, "x": 1}
    assert answer["flops"] == {"dense": 800, "x": 200}
    assert (answer["times_faster"]["x"], answer["times_fewer_flops"]["x"]) == (3, 4)
    assert answer["off"] == {"dense": 0, "x": -0.25}
    assert found["decoding"]["times_fewer_bytes"]["x"] == 1.5
    assert answer["times_faster_expected"]["x"] == round(3 / (2 / 4 + 1 / 1.5), 3)


@pytest.mark.thorough
def test_reduction_at_a_tiny_size(tmp_path, capsys):
    out, names = tmp_path / "out.json", ["fastervlm", "fastv"]
    reduction.main(["--tiny", "--rounds", "1", "--only", *names, "--out", str(out)])
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert not found["failed"]
    assert set(found["prefill"]["seconds"]) == {"dense", *names}
    assert set(found["choosing"]["share_of_dense_seconds"]) == set(names)
    assert all(found["prefill"]["times_fewer_flops"][name] > 1.2 for name in names)


def test_what_choosing_costs():
    """Alone before the decoder, as a difference within it, and of both kinds the sum."""
    best = {"dense": 10.0, "x": 4.0, "y": 5.0, "z": 5.0}
    best |= {"choosing x": 0.1, "ranking y": 10.3, "choosing z": 0.2, "ranking z": 10.1}
    flops = {"dense": 100, "x": 40, "y": 50, "z": 50, "ranking y": 102, "ranking z": 101}
    times = {"seconds": best, "median_seconds": best}
    found = reduction.summary(times, flops, {"x": 1, "z": 0})
    assert list(found["prefill"]["seconds"]) == ["dense", "x", "y", "z"]
    assert found["prefill"]["off"]["x"] == 0
    assert found["choosing"]["share_of_dense_seconds"] == {"x": 0.01, "y": 0.03, "z": 0.03}
    assert found["choosing"]["share_of_dense_flops"] == {"x": 0.01, "y": 0.02, "z": 0.01}


def test_what_ranks_and_drops_next_to_nothing():
    every = dict(reduction.entered(reduction.TINY, 0.5, ["aim", "fastervlm", "pyramiddrop"]))
    plain = every[reduction.DENSE]
    assert reduction.ranking(every["fastervlm"], plain) is None
    [pyramid] = reduction.ranking(every["pyramiddrop"], plain).policies
    assert pyramid.keep == (15, 14, 13)
    ranks = reduction.ranking(every["aim"], plain)
    assert ranks.reducer is None and ranks.policies[0].step == 1 / 16


def test_every_contestant_shares_the_weights_of_the_dense_one():
    entered = pillars.enter(pillars.TINY, [])
    assert {name.split()[0] for name in entered} == {
        "dense",
        "mqt",
        "p_mod",
        "gamma_mod",
        "deepstack",
    }
    dense = entered["dense"].params["decoder"]["stack"]["layers"]["q"]["kernel"]
    for each in entered.values():
        assert each.params["decoder"]["stack"]["layers"]["q"]["kernel"] is dense


def test_the_figures_are_fresh(repo):
    """The tables say what was counted, and a line of some is counted again; `python
    benchmarks/figures.py` counts and writes all.
    """
    numbers = json.loads((repo / figures.NUMBERS).read_text("utf-8"))
    assert (repo / figures.TABLES).read_text("utf-8") == figures.render(numbers)
    drawn = {"mqt": "MQT-LLaVA-7B, 16 tokens", "deepstack": "DeepStack-L, FLOPs of the decoder"}
    drawn["gamma_mod"] = "LLaVA-7B, 800 tokens, 31 % skipped"
    drawn["reduction"] = "MMTok, LLaVA-NeXT at 32 of each tile, tokens"
    for section in figures.SECTIONS:
        assert list(numbers[section.slug]) == [figure.what for figure in section.figures]
        for figure in section.figures:
            if figure.what == drawn.get(section.slug):
                assert round(figure.ours(), 6) == numbers[section.slug][figure.what]
            if figure.paper and abs(numbers[section.slug][figure.what] / figure.paper - 1) > 0.01:
                assert figure.why, figure.what


def test_training_takes_the_steps_of_pytorch(monkeypatch):
    train_speed = pytest.importorskip("benchmarks.train_speed")
    monkeypatch.setattr(train_speed.torch, "compile", lambda model: model)  # that takes a minute
    found = train_speed.compete(train_speed.TINY, rows=8, length=8, rounds=1)
    ours, theirs = found["first_losses"].values()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert ours[1] < ours[0]
    assert found["torch_compile_failed"] is None
    assert len(found["tokens_per_second"]) == 3


def test_reading_at_a_tiny_size(tmp_path, capsys):
    few = ["--pictures", "4", "--batch", "2", "--batches", "2", "--workers", "0"]
    reading.main([*few, "--steps", "0.001", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["readers"]["threads"]["images_per_second"] > 0
    assert 0 < found["data_wait_of_a_step"]["0.001 s"] < 1
