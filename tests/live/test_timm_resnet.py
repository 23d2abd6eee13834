"""A ResNet of timm with its running statistics: loaded, converted, and back in timm."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import save_file

import zoo
from tests.live.reference import close, redraw, state_of, timm, torch
from tests.live.test_regnet import running
from zoo.convert.convert import convert
from zoo.convert.export import export
from zoo.convert.place import abstract_params
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.registry import base
from zoo.models.core.tree import flat_paths, size_by_part
from zoo.train.config import Start
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.start import starting_variables

SMALL = {"layers": (2, 1, 1, 1), "channels": (4, 8, 8, 8)}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model of timm whose statistics are not those of a new one, and its folder."""
    theirs = running(redraw(timm.create_model("resnet50", num_classes=5, **SMALL)))
    folder = tmp_path_factory.mktemp("timm")
    fields = {"architecture": "resnet50", "num_classes": 5, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps({**fields, "model_args": SMALL}))
    save_file(theirs.state_dict(), folder / "model.safetensors")
    return theirs, folder


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).normal(size=(2, 48, 64, 3)).astype(np.float32)


def test_what_is_loaded_and_converted_gives_the_same(given, pixels, tmp_path):
    theirs, folder = given
    with torch.no_grad():
        want = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    loaded = zoo.load(folder)
    apply = jax.jit(loaded.model.apply)
    close(apply(loaded.variables, {"pixels": pixels}).logits, want)
    done = convert(folder, tmp_path / "ours")
    counts = {name for name in state_of(theirs) if name.endswith("num_batches_tracked")}
    assert set(done.dropped) == counts
    again = zoo.load(tmp_path / "ours")
    assert set(again.variables) == {"params", "stats"}
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    # Back to timm: the same tensors, which it takes.
    export(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in state_of(theirs).items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()})


def test_statistics_stay_float32_and_lie_on_a_mesh(given):
    _, folder = given
    mesh = make_mesh(MeshConfig(fsdp=2))
    half = zoo.load(folder, mesh=mesh, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    for path, leaf in flat_paths(half.stats).items():
        assert leaf.dtype == np.float32, path
        assert len(leaf.sharding.device_set) == 8
    other = half.with_(num_classes=5)  # the same settings: statistics stay
    assert flat_paths(other.stats).keys() == flat_paths(half.stats).keys()


def test_training_starts_from_them(given):
    theirs, folder = given
    config = zoo.load(folder).config
    made = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    starts, mesh = (Start(str(folder)),), make_mesh(MeshConfig())
    boxed = made["params"]
    _, stats = starting_variables(starts, (), config, boxed, made["stats"], mesh, 0, lambda _: None)
    mean = state_of(theirs)["bn1.running_mean"]
    np.testing.assert_array_equal(stats["tower"]["stem"]["norm"]["mean"], mean)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("timm_resnet50", 25_557_032),
        ("timm_resnet101", 44_549_160),
        ("timm_resnet152", 60_192_808),
    ],
)
def test_published_sizes(name, count):
    params = nn.unbox(abstract_params(base(name).variants[name]))
    assert size_by_part(params)["total"] == count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "resnet50d"}, "this zoo reads resnet50, resnet101, resnet152"),
        ({"architecture": "resnet50", "model_args": {"stem_width": 9}}, "change stem_width"),
    ],
)
def test_what_is_not_read(fields, message):
    read = base("timm_resnet").hf["timm_resnet"]
    with pytest.raises(UsageError, match=message):
        read(Fields("timm", {**fields, "model_type": "timm_resnet"}))
