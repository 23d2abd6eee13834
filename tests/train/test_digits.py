"""The recipes on scans of digits: two steps and an evaluation of each."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import zoo
from zoo.costing import program_flops
from zoo.train.cli import find
from zoo.train.data.dense import DigitsSegment
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.optim import OptimConfig
from zoo.train.plan.plan import traced_step

METRICS = {
    "espcn_digits": "psnr",
    "vwformer_digits": "mean_iou",
    "stunet_digits": "mean_iou",
    "vir_digits": "accuracy",
    "inceptionnext_digits": "accuracy",
    "meta_transformer_digits": "accuracy",
    "s2_digits": "accuracy",
}
"""What each is judged by."""


@pytest.mark.parametrize("name", ["espcn_digits", "vwformer_digits", "mrl_digits"])
def test_a_plan_knows_what_is_learned_besides_the_pictures(name):
    """A picture, a class for each place, one for each picture."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state, traced = traced_step(find(name), mesh)
    assert program_flops(traced.jaxpr) > 0
    assert jax.tree.structure(traced.out_info[0]) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "name",
    [n if n == "espcn_digits" else pytest.param(n, marks=pytest.mark.thorough) for n in METRICS],
)
def test_a_recipe_trains(name, tmp_path):
    found = find(name)
    data = found.data
    if isinstance(data, DigitsSegment):
        data = replace(data, pictures=8, validation_pictures=8)
    short = replace(
        found,
        data=data,
        steps=2,
        batch_size=8,
        eval_every=0,
        eval_examples=8,
        log_every=1,
        optim=OptimConfig(warmup=0),
    )
    result = train(short, tmp_path, data_dir=tmp_path)
    assert result.complete
    assert np.isfinite(result.metrics["eval/loss"])
    assert np.isfinite(result.metrics[f"eval/{METRICS[name]}"])
    assert zoo.load(tmp_path).config == found.model
