"""Loading checkpoints: sharded, in another dtype, under other names, tied; and what is refused."""

import json
from dataclasses import replace

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import zoo
from tests.convert.checkpoint import (
    LLAMA,
    config_of,
    nbytes_per_device,
    same_bits,
    state_of,
    write_checkpoint,
)
from zoo.convert import hub
from zoo.convert.layout import lay_out
from zoo.convert.place import abstract_params
from zoo.convert.tensor import Tensor
from zoo.models.core import registry
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.hf import Fields
from zoo.models.core.registry import base_of, read_hf
from zoo.models.core.tree import size_by_part
from zoo.models.parts.layers.stack import restack
from zoo.train.mesh import MeshConfig, make_mesh


def table(fields=LLAMA):
    return base_of(fields["model_type"]).table(config_of(fields))


def shapes_of(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def equal(params, want):
    return jax.tree.all(jax.tree.map(same_bits, restack(params), restack(want)))


def test_a_checkpoint_in_shards(tmp_path):
    state = state_of()
    loaded = zoo.load(write_checkpoint(tmp_path, state, shards=3))
    assert loaded.config == config_of()
    assert loaded.processor is None
    assert loaded.about["base"] == "llama"
    assert equal(loaded.params, table().load(state, shapes_of(loaded.params)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype(tmp_path, dtype):
    state = state_of()
    loaded = zoo.load(write_checkpoint(tmp_path, state), dtype=dtype)
    assert loaded.config.decoder.dtype == dtype
    cast = {name: array.astype(dtype) for name, array in state.items()}
    assert equal(loaded.params, table().load(cast, shapes_of(loaded.params)))


@pytest.mark.parametrize("dtype", ["int8", "floaty", "float64"])
def test_dtypes_that_are_refused(tmp_path, dtype):
    with pytest.raises(UsageError, match=f"dtype is '{dtype}': want one of float32, bfloat16"):
        zoo.load(write_checkpoint(tmp_path), dtype=dtype)


def test_mixed_dtypes_become_the_wider_one(tmp_path):
    state = state_of()
    norm = "model.layers.1.input_layernorm.weight"
    state[norm] = state[norm].astype(np.float32)
    params = zoo.load(write_checkpoint(tmp_path, state)).params
    scale = params["decoder"]["stack"]["layers"]["attn_norm"]["scale"]
    assert {row.dtype for row in scale} == {np.dtype("float32")}
    np.testing.assert_array_equal(scale[1], state[norm])


def test_a_mesh_of_eight_devices(tmp_path, monkeypatch):
    """Every device gets its share, and at no time more than that and one tensor."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    wide = {**LLAMA, "vocab_size": 512, "hidden_size": 64}
    folder = write_checkpoint(tmp_path, fields=wide, shards=2)
    largest, held = 2 * 512 * 64, []
    read = Tensor.__array__

    def watched(tensor, *args, **kwargs):
        held.append(nbytes_per_device(jax.live_arrays()))
        return read(tensor, *args, **kwargs)

    before = nbytes_per_device(jax.live_arrays())
    monkeypatch.setattr(Tensor, "__array__", watched)
    loaded = zoo.load(folder, mesh=mesh)
    one = zoo.load(folder)
    share = nbytes_per_device(loaded.params)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(one.params))
    assert len(share) == 8
    # All but the norms, which every device has, is divided by eight, or by four where only `embed`
    # can be.
    assert max(share.values()) < whole / 4
    for now in held[: len(held) // 2]:  # those of the load onto the mesh
        assert all(now.get(d, 0) - before.get(d, 0) <= share[d] + largest for d in share)
    assert equal(loaded.params, one.params)


def test_the_table_is_read_a_tensor_at_a_time():
    class Lazy:
        alive = 0

        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype
            self.reads = 0

        def __array__(self, dtype=None, copy=None):
            self.reads += 1
            return self.array

    state = {name: Lazy(array) for name, array in state_of().items()}
    params = shapes_of(table().load(state_of(), zoo_shapes()))
    rows = table().stream(state, params)
    assert not any(tensor.reads for tensor in state.values())
    first = next(rows)
    assert not any(tensor.reads for tensor in state.values())
    assert first.row is None  # the largest is the vocabulary, which is not stacked
    first.read()
    assert sum(tensor.reads for tensor in state.values()) == 1
    for piece in rows:
        piece.read()
    assert all(tensor.reads == 1 for tensor in state.values())


def zoo_shapes():
    import flax.linen as nn

    from zoo.convert.place import abstract_params

    return nn.unbox(abstract_params(config_of()))


def test_buffers_of_old_checkpoints_are_dropped_and_nothing_else(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    folder = write_checkpoint(tmp_path, {**state_of(), **extra})
    assert zoo.load(folder).about["base"] == "llama"
    kept = lay_out({"position_ids": 1, "x.position_ids": 2}, (), frozenset({"x.position_ids"}))
    assert kept.tensors == {"x.position_ids": 2}
    assert kept.names == {"position_ids": None, "x.position_ids": "x.position_ids"}
    write_checkpoint(tmp_path, {**state_of(), "model.layers.0.extra": np.ones(4, np.float32)})
    with pytest.raises(ZooError, match=r"extra: model.layers.0.extra \(4,\)"):
        zoo.load(folder)


def test_other_layouts_are_renamed(tmp_path, monkeypatch):
    monkeypatch.setitem(
        registry._bases, "llama", replace(base_of("llama"), renames=((r"^old\.", "model."),))
    )
    state = state_of()
    old = {name.replace("model.", "old.", 1): array for name, array in state.items()}
    loaded = zoo.load(write_checkpoint(tmp_path, old))
    assert equal(loaded.params, table().load(state, shapes_of(loaded.params)))
    twice = {**old, "model.norm.weight": state["model.norm.weight"]}
    with pytest.raises(ZooError, match="are the same tensor in this layout"):
        zoo.load(write_checkpoint(tmp_path, twice))


def test_tied_heads(tmp_path):
    fields = {**LLAMA, "tie_word_embeddings": True}
    state = state_of(fields)
    assert "lm_head.weight" not in state
    params = zoo.load(write_checkpoint(tmp_path, state, fields)).params
    copy = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    assert equal(zoo.load(write_checkpoint(tmp_path, copy, fields)).params, params)
    copy["lm_head.weight"] = copy["lm_head.weight"] + 1
    copy["lm_head.weight"] = copy["lm_head.weight"].astype(ml_dtypes.bfloat16)
    write_checkpoint(tmp_path, copy, fields)
    with pytest.raises(ZooError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        zoo.load(tmp_path)
    copy["lm_head.weight"] = copy["lm_head.weight"][:5]
    write_checkpoint(tmp_path, copy, fields)
    with pytest.raises(ZooError, match=r"misshapen: lm_head.weight is \(5, 32\), want \(96, 32\)"):
        zoo.load(tmp_path)


def test_everything_that_does_not_fit_is_listed(tmp_path):
    state = state_of()
    state["model.norms.weight"] = state.pop("model.norm.weight")
    state["lm_head.weight"] = state["lm_head.weight"][:3]
    del state["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ZooError) as error:
        zoo.load(write_checkpoint(tmp_path, state))
    for text in (
        str(tmp_path),
        "missing: model.norm.weight (32,) (nearest: model.norms.weight)",
        "extra: model.norms.weight (32,) (nearest: model.norm.weight)",
        "missing: model.layers.2.mlp.up_proj.weight (48, 32)",
        "misshapen: lm_head.weight is (3, 32), want (96, 32)",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**LLAMA, "model_type": "lama"}, "model_type 'lama' is not one that this zoo reads"),
        ({**LLAMA, "wild": 3}, "unknown fields that may change the numbers: wild = 3"),
        ({**LLAMA, "hidden_size": "wide"}, r"config.json describes no model: "),
        ({**LLAMA, "num_attention_heads": 0}, r"config.json describes no model: "),
        ({**LLAMA, "intermediate_size": -8}, r"config.json describes no model: "),
        ({**LLAMA, "rope_scaling": "linear"}, r"config.json describes no model: "),
    ],
)
def test_configurations_that_are_not_understood(tmp_path, fields, message):
    write_checkpoint(tmp_path, state_of())
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=message):
        zoo.load(tmp_path)


def test_a_truncated_checkpoint(tmp_path):
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ZooError, match=r"model.safetensors cannot be used: it is truncated"):
        zoo.load(tmp_path)


def test_names_on_the_hub(tmp_path, monkeypatch):
    """What is asked of the hub's library, which is not called here."""
    import huggingface_hub

    asked = []

    class Api:
        def list_repo_files(self, name, revision):
            asked.append((name, revision))
            return files

    def download(name, **options):
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = ["model.safetensors", "pytorch_model.bin", "config.json"]
    assert hub.folder_of("org/name@v2") == tmp_path
    assert asked[0] == ("org/name", "v2")
    patterns = asked[1]["allow_patterns"]
    assert asked[1]["revision"] == "v2" and "*.safetensors" in patterns
    assert "tokenizer.json" not in patterns and "*.json" in patterns
    assert not {"*.bin", "*.pth", "*.py", "*"} & set(patterns)
    files = ["pytorch_model.bin", "config.json", "onnx/model.safetensors"]
    hub.folder_of("org/name")
    patterns = asked[3]["allow_patterns"]
    assert "*.bin" in patterns and "*.safetensors" not in patterns


def test_the_hub_out_of_reach(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ZooError, match="org/nothing is no folder here, and the Hugging Face hub"):
        zoo.load("org/nothing")


def test_a_folder_that_is_not_there_is_no_hub_name(tmp_path):
    for name in (tmp_path / "x", "./x", "runs/deep/x", "x"):
        with pytest.raises(ZooError, match="does not exist: name the folder"):
            zoo.load(name)


def test_a_folder_of_timm(tmp_path):
    """Its `config.json` names an architecture and no `model_type`."""
    fields = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {}}
    config = read_hf(Fields("timm", {**fields, "model_type": "timm_wrapper"}))
    shapes = nn.unbox(abstract_params(config))
    wanted = base_of("timm_wrapper").table(config).shapes(shapes)
    state = {name: np.full(shape, 0.5, np.float16) for name, shape in wanted.items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields), "utf-8")
    loaded = zoo.load(tmp_path)
    assert loaded.config == config
    assert size_by_part(loaded.params)["total"] == 5_524_416 + 3 * 193
