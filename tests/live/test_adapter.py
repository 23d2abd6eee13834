"""Adapters in the layout of `peft`: written, read, and the same numbers in transformers."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import zoo
from tests.live import test_decoders as decoders
from tests.live import test_llava_family as family
from tests.live import test_qwen_vl as qwen
from tests.live.reference import close, redraw, state_of, torch, transformers
from tests.train.test_lora import drawn
from tests.train.tiny import find_here, tiny
from zoo.cli import main
from zoo.convert.adapter import CONFIG, WEIGHTS, write_adapter
from zoo.convert.place import abstract_params, flat_paths, nested
from zoo.convert.safetensors import read_safetensors
from zoo.convert.trained import export_adapter, export_trained
from zoo.loading import architecture, config_of
from zoo.models.core import codec
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.registry import base_of
from zoo.models.parts.layers import low_rank
from zoo.models.parts.layers.operands import LowRank, merge
from zoo.models.parts.layers.stack import restack
from zoo.train.config import Start
from zoo.train.loop import train
from zoo.train.lora import LINEAR, LoRA
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.objectives import NextToken

LAYERS = (LINEAR,)
HEAD = dict.fromkeys(("llava", "qwen2_5_vl"), ("decoder/lm_head/kernel",))
"""Models whose head is no copy of the vocabulary table, of those that are asked."""


def with_adapters(config, params, patterns=LAYERS, rank=3, seed=0):
    """Parameters with random operands."""
    kernels = low_rank.targets(abstract_params(config), patterns)
    shapes = low_rank.adapters(kernels, rank)
    own = flat_paths(drawn(shapes, seed))
    own = {
        path: np.full_like(leaf, 0.5) if path.endswith(low_rank.SCALE) else leaf
        for path, leaf in own.items()
    }
    return low_rank.attach(nested(flat_paths(params) | own))


def saved(name, folder):
    """A decoder of transformers in a folder, its configuration and parameters here."""
    hf, config = decoders.original(name)
    hf.save_pretrained(folder)
    return hf, config, decoders.converted(hf, config)[2]


def added(hf, folder):
    """The state dict of a model with an adapter merged into it, by hand."""
    settings = json.loads((folder / CONFIG).read_text())
    tensors = {name: np.asarray(leaf) for name, leaf in read_safetensors(folder / WEIGHTS).items()}
    state = {name: torch.tensor(leaf) for name, leaf in state_of(hf).items()}
    for name in tensors:
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            alpha = settings["alpha_pattern"].get(module, settings["lora_alpha"])
            state[f"{module}.weight"] += torch.tensor(alpha / len(a) * (b @ a))
    return state


def theirs(hf, ids, mask):
    with torch.no_grad():
        found = hf(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    return found.logits.numpy()


@pytest.mark.parametrize(
    ("name", "modules"),
    [("llama gqa, biases, wide heads", 14), ("phi3", 8), ("opt", 12)],
)
def test_an_adapter_adds_to_theirs_what_it_adds_to_ours(name, modules, tmp_path):
    name = next(case for case in decoders.CASES if case.startswith(name))
    hf, config, params = saved(name, tmp_path / "base")
    operands = with_adapters(config, params)
    home = base_of(hf.config.model_type)
    folder = write_adapter(tmp_path / "adapter", operands, home, config, str(tmp_path / "base"))
    settings = json.loads((folder / CONFIG).read_text())
    assert len(settings["target_modules"]) == modules
    assert set(settings["target_modules"]) <= dict(hf.named_modules()).keys()
    if name.startswith("phi3"):  # queries, keys and values are one module of theirs
        assert settings["rank_pattern"] and max(settings["rank_pattern"].values()) == 9
    else:
        assert (settings["r"], settings["lora_alpha"]) == (3, 1.5)
        assert not settings["rank_pattern"] and not settings["alpha_pattern"]

    ids, mask = decoders.text(0)
    ours = jax.jit(decoders.logits_of(config.build(), ids, mask))
    plain = theirs(hf, ids, mask)
    hf.load_state_dict(added(hf, folder))
    wanted = theirs(hf, ids, mask)
    assert np.abs(wanted - plain).max() > 0.05 * np.abs(plain).max()
    close(ours(operands), wanted, what="operands")
    loaded = zoo.load(tmp_path / "base", adapter=folder)
    close(ours(loaded.params), wanted, what="loaded")
    close(ours(merge(loaded.params)), wanted, what="merged")
    assert loaded.about["adapter"] == str(folder)
    if name.startswith("llama"):
        whole = flat_paths(restack(loaded.params))
        for path, leaf in flat_paths(operands).items():
            if isinstance(leaf, LowRank):
                for part in ("a", "b", "scale"):
                    np.testing.assert_array_equal(getattr(whole[path], part), getattr(leaf, part))
    again = write_adapter(tmp_path / "again", loaded.params, home, config, str(tmp_path / "base"))
    for name, leaf in read_safetensors(folder / WEIGHTS).items():
        found = np.asarray(read_safetensors(again / WEIGHTS)[name])
        np.testing.assert_array_equal(found, np.asarray(leaf), err_msg=name)


@pytest.mark.parametrize(
    "name", ["llava", "next", "onevision", "internvl", "qwen2_vl", "qwen2_5_vl"]
)
def test_modules_of_models_that_see_exist(name, tmp_path):
    if name.startswith("qwen"):
        pair = qwen.pair(name)
        hf, config, params = pair.hf, pair.config, pair.params
    else:
        hf, config, params = family.converted(name)
    patterns = (LINEAR, r"(tower|connector)/(?!patch/).*kernel", *HEAD.get(name, ()))
    operands = with_adapters(config, params, patterns)
    home = base_of(hf.config.model_type)
    folder = write_adapter(tmp_path / "adapter", operands, home, config, "")
    modules = json.loads((folder / CONFIG).read_text())["target_modules"]
    known = {n for n, module in hf.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(modules) <= known, sorted(set(modules) - known)[:4]
    assert any("language_model" in module for module in modules)
    assert any("vision_tower" in module or "visual" in module for module in modules)
    assert ("lm_head" in modules) == (name in HEAD)
    tensors = read_safetensors(folder / WEIGHTS)
    for module in modules:
        linear = hf.get_submodule(module)
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].shape for part in "AB")
        assert (b[0], a[1]) == tuple(linear.weight.shape) and a[0] == b[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint, an adapter for it, and its model."""
    folder = tmp_path_factory.mktemp("llama")
    hf, config, params = saved("llama mha", folder / "base")
    write_adapter(folder / "adapter", with_adapters(config, params), base_of("llama"), config, "x")
    return hf, config, folder


def changed(llama, tmp_path, tensors=None, **settings):
    """A copy of the adapter with other settings."""
    *_, folder = llama
    known = json.loads((folder / "adapter" / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**known, **settings}))
    (tmp_path / WEIGHTS).write_bytes((folder / "adapter" / WEIGHTS).read_bytes())
    return tmp_path


def test_settings_that_change_numbers_are_read_or_refused(llama, tmp_path):
    *_, folder = llama
    q = "decoder/stack/layers/q/kernel"

    def scales(**settings):
        loaded = zoo.load(folder / "base", adapter=changed(llama, tmp_path, **settings))
        return [float(row.scale) for row in flat_paths(loaded.params)[q]]

    assert scales() == [0.5, 0.5]
    assert scales(lora_alpha=12) == [4, 4]
    np.testing.assert_allclose(scales(lora_alpha=12, use_rslora=True), 12 / 3**0.5, rtol=1e-6)
    assert scales(alpha_pattern={"layers.1.self_attn.q_proj": 6}) == [0.5, 2]
    refused = {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"], "new_thing": 3}
    for name, value in refused.items():
        with pytest.raises(UsageError, match=f"{name} is .* not understood"):
            scales(**{name: value})
    with pytest.raises(UsageError, match="want 'LORA'"):
        scales(peft_type="IA3")
    changed(llama, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ZooError, match="cannot be read"):
        zoo.load(folder / "base", adapter=tmp_path)


def test_an_adapter_of_another_model_is_refused(llama, tmp_path):
    *_, folder = llama
    saved("llama mqa, tied, linear", tmp_path / "base")
    with pytest.raises(ZooError, match="does not fit"):
        zoo.load(tmp_path / "base", adapter=folder / "adapter")
    saved("opt", tmp_path / "opt")
    with pytest.raises(ZooError, match="is no linear map of this model"):
        zoo.load(tmp_path / "opt", adapter=folder / "adapter")


def test_on_a_mesh_adapters_lie_as_their_kernels_do(llama):
    *_, folder = llama
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = zoo.load(folder / "base", adapter=folder / "adapter", mesh=mesh).params
    kernel = params["decoder"]["stack"]["layers"]["q"]["kernel"]
    assert kernel.a.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert kernel.b.sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")


def test_a_run_leaves_adapters_and_both_are_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "_find", find_here)
    hf = redraw(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=family.CLIP,
                text_config={**family.LLAMA, "vocab_size": 320},
                image_token_index=3,
            )
        )
    )
    hf.save_pretrained(tmp_path / "base")
    model = replace(config_of(tmp_path / "base"), text_tokens=24)
    run = tiny(
        model=model,
        start=(Start(str(tmp_path / "base")),),
        objective=NextToken(),
        lora=LoRA(rank=2, alpha=8, lr=3e-2),
        steps=4,
        mesh=MeshConfig(fsdp=2),
    )
    result = train(run, tmp_path / "run")
    adapted = zoo.load(tmp_path / "base", adapter=tmp_path / "run" / "adapter")
    found, whole = flat_paths(restack(merge(adapted.params))), flat_paths(result.params)
    for path, leaf in whole.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-7, err_msg=path)

    assert main(["export", str(tmp_path / "run"), str(tmp_path / "whole")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "only"), "--adapter"]) == 0
    assert zoo.load(tmp_path / "base", adapter=tmp_path / "only").about["adapter"]
    theirs = type(hf).from_pretrained(tmp_path / "whole")
    merged = added(hf, tmp_path / "only")
    moved = 0
    for name, leaf in theirs.state_dict().items():
        np.testing.assert_allclose(leaf, merged[name], rtol=1e-6, atol=1e-7, err_msg=name)
        moved += not torch.equal(leaf, hf.state_dict()[name])
    assert moved == 14
    with pytest.raises(UsageError, match="exists"):
        export_trained(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(UsageError, match="has no adapter/"):
        export_adapter(tmp_path / "base", tmp_path / "none")


def test_a_model_of_nobody_has_no_layout_for_adapters():
    with pytest.raises(UsageError, match="no checkpoint of the Hugging Face hub"):
        architecture(zoo.config("llava_tiny"), {})
    with pytest.raises(UsageError, match="no checkpoint of the Hugging Face hub"):
        architecture(zoo.config("mqt_tiny"), {"base": "llama"})
    assert architecture(zoo.config("llama_tiny"), {"base": "llama"}).slug == "llama"


# ------------------------------------------------------------------ peft itself, where it is


@pytest.mark.parametrize("kind", ["plain", "rank-stabilised, ranks by pattern"])
def test_theirs_is_read(llama, tmp_path, kind):
    peft = pytest.importorskip("peft")
    hf, config, folder = llama
    base = type(hf).from_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    if kind != "plain":
        settings |= {
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        }
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, leaf in wrapped.named_parameters():
            if "lora_" in name:
                leaf.copy_(0.3 * torch.randn(leaf.shape, generator=generator))
    wrapped.eval().save_pretrained(tmp_path)
    ids, mask = decoders.text(0)
    loaded = zoo.load(folder / "base", adapter=tmp_path)
    found = jax.jit(decoders.logits_of(config.build(), ids, mask))(loaded.params)
    close(found, theirs(wrapped, ids, mask))


def test_ours_is_read_by_theirs(llama):
    peft = pytest.importorskip("peft")
    hf, config, folder = llama
    base = type(hf).from_pretrained(folder / "base")
    wrapped = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    ids, mask = decoders.text(0)
    loaded = zoo.load(folder / "base", adapter=folder / "adapter")
    found = jax.jit(decoders.logits_of(config.build(), ids, mask))(loaded.params)
    wanted = theirs(wrapped, ids, mask)
    close(found, wanted)
    assert np.abs(wanted - theirs(hf, ids, mask)).max() > 1e-2
