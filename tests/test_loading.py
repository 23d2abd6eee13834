"""A saved model: whole, complete in itself, and refused with a clear line when it is not."""

import json
import shutil
from errno import ENOSPC

import jax
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

import zoo
from tests.models.draw import draw
from zoo import saving
from zoo.models.connectors.mqt import CARD
from zoo.models.core.errors import ZooError
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.saving import save_model, saved_about
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


def test_an_unfinished_training_says_how_far_it_is(tmp_path):
    for step in ("20", "100"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    with pytest.raises(ZooError, match="its training has reached step 100; run the same"):
        zoo.load(tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 300}')
    with pytest.raises(ZooError, match="its training has reached step 100 of 300; run the same"):
        zoo.load(tmp_path)
