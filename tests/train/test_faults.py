"""Steps at fault in a run: it stops, leaves them out, or goes back."""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.tiny import TinyData, _Source, tiny
from zoo.models.core.errors import UsageError, ZooError
from zoo.train.config import Faults
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig
from zoo.train.metrics import read_metrics
from zoo.train.objectives import Mean, NextToken


@dataclass(frozen=True)
class WhiteData(TinyData):
    """One record, and so one batch of every epoch of five, is white."""

    def source(self, split, data_dir):
        return _White(self)


@dataclass(frozen=True)
class _White(_Source):
    def __getitem__(self, index):
        record = super().__getitem__(index)
        white = {"image": np.full((8, 8, 3), 255, np.uint8)} if index == 7 else {}
        return {**record, **white}


@dataclass(frozen=True)
class Blinded(NextToken):
    """Next tokens, whose loss is not finite where a picture is white."""

    def loss(self, model, variables, aux, batch, key, variant, *, train=True):
        terms, *others = super().loss(model, variables, aux, batch, key, variant, train=train)
        white = (batch["pixels"] > 0.99).any()
        loss = terms["loss"]
        total = jnp.where(white, jnp.nan, loss.total)
        return ({**terms, "loss": Mean(total, loss.weight)}, *others)


def blinded(do, **changes):
    changes = {"save_every": 3, "log_every": 2, "mesh": MeshConfig(fsdp=8, data=1), **changes}
    return tiny(data=WhiteData(), objective=Blinded(), faults=Faults(do=do), **changes)


@pytest.fixture(scope="module")
def white(tmp_path_factory):
    """The places of the white batches among the first 24, found by a run that skips them."""
    out = tmp_path_factory.mktemp("skip")
    result = train(blinded("skip", steps=24, log_every=1), out)
    records = read_metrics(out / "metrics.jsonl")
    skipped = [record.get("skipped", 0) for record in records]
    found = {i for i, (a, b) in enumerate(zip([0, *skipped], skipped)) if b > a}
    assert result.complete
    assert {place // 5 for place in found} == set(range(len(found)))  # one in each epoch
    assert {records[i]["loss"] for i in found} == {None}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.params))
    assert f"left out so far: {len(found)}" in (out / "train.log").read_text()
    return found


def expected(white, steps=12, save_every=3):
    """(step gone back to, batches left out), each time, by the rule."""
    place = step = saved_place = saved = 0
    said = []
    while step < steps:
        if place in white:
            left_out = place + 1 - saved_place
            said.append((saved, left_out))
            place, step = place + 1, saved
            continue
        place, step = place + 1, step + 1
        if step % save_every == 0:
            saved, saved_place = step, place
    return said


def said(out):
    pattern = r"going back to step (\d+) and leaving out the (\d+) batches"
    return [tuple(map(int, m)) for m in re.findall(pattern, (out / "train.log").read_text())]


def losses(out):
    return {r["step"]: r["loss"] for r in read_metrics(out / "metrics.jsonl")}


@pytest.fixture(scope="module")
def went_back(tmp_path_factory):
    out = tmp_path_factory.mktemp("rewind")
    result = train(blinded("rewind"), out)
    assert result.complete
    return out, result


def test_it_goes_back_and_leaves_out_what_came_next(white, went_back):
    out, _ = went_back
    assert said(out) == expected(white)
    assert len(said(out)) >= 2
    found = losses(out)
    assert list(found) == [2, 3, 4, 6, 8, 9, 10, 12]
    assert all(np.isfinite(loss) for loss in found.values())


def test_broken_off_anywhere_it_goes_back_the_same_way(went_back, tmp_path):
    out, whole = went_back

    for step in (5, 8):

        def crash(model, params, reached, step=step):
            if reached == step:
                raise RuntimeError("power cut")
            return {}

        with pytest.raises(RuntimeError, match="power cut"):
            train(blinded("rewind", eval_every=step), tmp_path, on_eval=crash)
    cut = train(blinded("rewind"), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, cut.params, whole.params)
    found = losses(out)
    assert all(found[step] == loss for step, loss in losses(tmp_path).items() if step in found)


def test_it_stops_after_too_many(tmp_path):
    for do in ("stop", "rewind", "skip"):
        experiment = replace(blinded(do), faults=Faults(do=do, most=1))
        with pytest.raises(ZooError, match=r"step \d+: the loss, .* not finite"):
            train(experiment, tmp_path / do)
    assert len(said(tmp_path / "rewind")) == 1


def test_a_policy_that_cannot_be_is_refused():
    for wrong in ({"do": "hope"}, {"spike": 1.0}, {"most": -1}):
        (name,) = wrong
        with pytest.raises(UsageError, match=rf"faults\.{name} is"):
            Faults(**wrong)
