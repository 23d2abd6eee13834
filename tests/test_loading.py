"""A saved model: whole, complete in itself, and refused with a clear line when it is not."""

import json
import shutil
from dataclasses import fields, replace
from errno import ENOSPC

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

import zoo
from tests.convert.checkpoint import config_of, same_bits, state_of, write_checkpoint
from tests.models.draw import draw
from zoo import saving
from zoo.convert.convert import convert
from zoo.convert.place import flat_paths
from zoo.convert.transfer import plan_transfer
from zoo.models.connectors.deepstack import DeepStackV
from zoo.models.connectors.mqt import CARD, MQT
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.registry import base_of
from zoo.models.decoders.p_mod import PMoD
from zoo.models.parts.layers.stack import restack
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.saving import save_model, saved_about
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.whole import write_manifest

FILES = ("params.safetensors", "config.json", "processor.json", "tokenizer.json", "manifest.json")


@pytest.fixture(scope="module")
def parts():
    """Configuration, parameters and processor of a tiny model."""
    config = zoo.config("mqt_tiny")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    processor = Processor(ImageProcessor(16), Tokenizer.train(["which digit?"], 300), 24)
    return config, draw(shapes), processor


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("run") / "model", *parts, {"step": 7})


@pytest.fixture
def copy(saved, tmp_path):
    """A run folder with a model to damage."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path


def test_what_is_loaded_is_what_was_saved(parts, saved):
    config, params, processor = parts
    for folder in (saved, str(saved.parent)):
        loaded = zoo.load(folder)
        assert loaded.config == config
        assert loaded.model == config.build()
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, params))
        assert loaded.processor.image == processor.image
        assert loaded.processor.max_length == processor.max_length
        assert loaded.processor.tokenizer.encode(" 17") == processor.tokenizer.encode(" 17")
        assert loaded.about == {"step": 7}
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    described = json.loads((saved / "config.json").read_text())
    assert described["cards"][0]["slug"] == CARD.slug
    assert described["layout"] == saving.LAYOUT


def test_a_model_is_replaced_as_a_whole(parts, copy):
    assert saved_about(copy / "model") == {"step": 7}
    save_model(copy / "model", *parts, {"step": 8})
    assert zoo.load(copy).about == {"step": 8}
    assert [path.name for path in copy.iterdir()] == ["model"]


def test_a_full_disk_leaves_what_was_there(parts, copy, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(ZooError, match=r"could not be written to .*: No space left"):
        save_model(copy / "model", *parts, {"step": 8})
    assert zoo.load(copy).about == {"step": 7}
    assert [path.name for path in copy.iterdir()] == ["model"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut off", "changed"])
def test_a_damaged_file_is_named(copy, name, how):
    file = copy / "model" / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        half = len(content) // 2
        changed = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        file.write_bytes(content[:half] if how == "cut off" else changed)
    assert saved_about(copy / "model") is None
    with pytest.raises(ZooError) as error:
        zoo.load(copy)
    assert str(copy / "model") in str(error.value)
    assert "run the training command again" in str(error.value)
    # A digit that changes inside of the manifest makes some other file look changed.
    assert name in str(error.value) or (name == "manifest.json" and how == "changed")


def test_parameters_have_to_be_exactly_those_of_the_model(copy):
    file = copy / "model" / "params.safetensors"
    params = load_file(file)
    params["extra/kernel"] = params.pop("connector/out/bias")
    params["connector/q_norm/scale"] = params["connector/q_norm/scale"][:3]
    save_file(params, file)
    write_manifest(copy / "model")
    with pytest.raises(ZooError) as error:
        zoo.load(copy)
    assert "connector/out/bias is missing" in str(error.value)
    assert "extra/kernel is not in the model" in str(error.value)
    assert "connector/q_norm/scale is (3,), want (16,)" in str(error.value)


def test_another_layout_is_refused(copy):
    file = copy / "model" / "config.json"
    file.write_text(file.read_text().replace('"layout": 1', '"layout": 2'))
    write_manifest(copy / "model")
    with pytest.raises(ZooError, match=r"its layout is 2 and this version reads 1"):
        zoo.load(copy)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ZooError, match=r"nowhere does not exist: name the folder"):
        zoo.load(tmp_path / "nowhere")
    with pytest.raises(ZooError, match="holds no model: name the folder"):
        zoo.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="file is a file"):
        zoo.load(tmp_path / "file")
    with pytest.raises(ZooError, match="nowhere does not exist: name the folder"):
        convert(tmp_path / "nowhere", tmp_path / "new")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "config.json is missing: a checkpoint has one"),
        ("model.safetensors", '{"model_type": "lla', "config.json cannot be read"),
        ("model.safetensors", "[" * 100_000, "config.json cannot be read"),
        ("pytorch_model.bin", "{}", "config.json names no model_type"),
        ("params.safetensors", "{}", "manifest.json is missing, so it was not finished"),
    ],
)
def test_weights_with_a_bad_configuration(tmp_path, file, content, message):
    (tmp_path / file).touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ZooError, match=message):
        zoo.load(tmp_path)


def test_an_unfinished_training_says_how_far_it_is(tmp_path):
    for step in ("20", "100"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    with pytest.raises(ZooError, match="its training has reached step 100; run the same"):
        zoo.load(tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 300}')
    with pytest.raises(ZooError, match="its training has reached step 100 of 300; run the same"):
        zoo.load(tmp_path)


# Into other models

LLAVA = {
    "model_type": "llava",
    "image_token_index": 3,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "image_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 4,
    },
}
ROUTERS = {"decoder/stack/layers/router/out/bias", "decoder/stack/layers/router/out/kernel"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a checkpoint, and what it holds by our paths."""
    state = state_of(LLAVA, np.float32)
    state = {name: array / np.float32(array.shape[-1] ** 0.5) for name, array in state.items()}
    folder = write_checkpoint(tmp_path_factory.mktemp("hub") / "llava", state, LLAVA)
    config = config_of(LLAVA)
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    return folder, flat_paths(base_of("llava").table(config).load(state, nn.unbox(shapes)))


def logits(loaded):
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 60, (2, 6), np.int32)
    ids[:, 1] = loaded.config.image_id
    pixels = rng.normal(size=(2, 1, 16, 16, 3)).astype(np.float32)
    return np.asarray(loaded.logits({"ids": ids, "pixels": pixels}))


def test_a_policy_in_its_neutral_setting_changes_nothing(published):
    folder, stored = published
    plain = zoo.load(folder)
    assert not {"new", "unused"} & set(plain.about)
    neutral = PMoD(schedule="interleave", factor=1.0)
    loaded = zoo.load(folder, policies=(neutral,))
    assert loaded.config.policies == (neutral,)
    assert set(loaded.about["new"]) == ROUTERS
    assert loaded.about["unused"] == []
    params = flat_paths(restack(loaded.params))
    assert all(same_bits(params[path], array) for path, array in stored.items())
    assert params.keys() - stored.keys() == ROUTERS
    np.testing.assert_allclose(logits(loaded), logits(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["hub", "converted"])
def test_another_connector_and_nothing_else(published, tmp_path, kind):
    """What the file has for tower and decoder arrives bit by bit; the connector starts anew. The
    second case is also on a mesh, in another dtype.
    """
    folder, stored = published
    options = {"connector": MQT(num_queries=4, num_heads=2), "policies": (PMoD(),)}
    dtype = "float32"
    if kind == "converted":
        convert(folder, tmp_path / "ours")
        folder, dtype = tmp_path / "ours", "bfloat16"
        options |= {"dtype": dtype, "mesh": make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))}
    loaded = zoo.load(folder, **options)
    params = flat_paths(restack(loaded.params))
    kept = {path for path in stored if not path.startswith("connector/")}
    for path in kept:
        assert same_bits(params[path], stored[path].astype(dtype)), path
    new = {path for path in params if path.startswith("connector/")} | ROUTERS
    assert set(loaded.about["new"]) == new == params.keys() - kept
    assert set(loaded.about["unused"]) == stored.keys() - kept
    assert {leaf.dtype.name for leaf in params.values()} == {dtype}
    queries = np.asarray(params["connector/queries"], np.float32)
    assert 0.01 < queries.std() < 0.03, "its own initialisation"
    assert not np.asarray(params["decoder/stack/layers/router/out/kernel"]).any()
    if kind == "converted":
        assert not params["connector/q/kernel"].sharding.is_fully_replicated
        return
    assert np.isfinite(logits(loaded)).all()
    other = flat_paths(zoo.load(folder, **options, seed=1).params)
    assert not np.array_equal(other["connector/queries"], queries)


def test_a_run_into_another_model_and_saved_again(parts, saved, tmp_path):
    _, params, processor = parts
    loaded = zoo.load(saved, policies=(PMoD(max_ratio=1.0),))
    assert set(loaded.about["new"]) == ROUTERS
    again = save_model(
        tmp_path / "model", loaded.config, loaded.params, processor, dict(loaded.about)
    )
    back = zoo.load(again)
    assert back.config == loaded.config
    assert back.about["step"] == 7 and set(back.about["new"]) == ROUTERS
    assert jax.tree.all(jax.tree.map(np.array_equal, back.params, loaded.params))
    without = zoo.load(again, policies=())
    assert jax.tree.all(jax.tree.map(np.array_equal, without.params, params))
    assert set(without.about["unused"]) == ROUTERS


def test_a_part_of_a_subclass_takes_what_fits():
    config = config_of(LLAVA)
    tower = DeepStackV(**{f.name: getattr(config.tower, f.name) for f in fields(config.tower)})
    for old, new in (
        (config, replace(config, tower=tower)),
        (replace(config, tower=tower), config),
    ):
        plan = plan_transfer(old, new, "somewhere")
        assert not plan.new and not plan.unused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"decoder.depth": 2},
            r"q/kernel is \(3, 24, 4, 6\) in the checkpoint, want \(2, 24, 4, 6",
        ),
        ({"bias": False}, r"connector/up/bias is \(24,\) in the checkpoint, want absent"),
        ({"policies": ("p_mod",)}, r"policies\[0\] = 'p_mod': want an instance"),
        ({"polices": ()}, "did you mean policies"),
    ],
)
def test_settings_that_the_checkpoint_does_not_fit(published, overrides, said):
    with pytest.raises(UsageError, match=said):
        zoo.load(published[0], **overrides)
