"""Checkpoints that transformers writes: loaded, converted, exported, read by it again, compared."""

import json

import jax
import numpy as np
import pytest

import zoo
from tests.convert.checkpoint import same_bits
from tests.live import test_end_to_end as end_to_end
from tests.live import tiny_processors
from tests.live.reference import redraw, torch, transformers
from zoo import cli
from zoo.convert.convert import convert
from zoo.convert.export import export
from zoo.convert.folder import read_weights
from zoo.convert.verify import verify
from zoo.models.core.errors import ZooError

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def llama(**options):
    config = transformers.LlamaConfig(**{**TEXT, "num_key_value_heads": 1, **options})
    return redraw(transformers.LlamaForCausalLM(config))


def clip():
    text = {**TEXT, "max_position_embeddings": 12, "eos_token_id": 63}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    return redraw(transformers.CLIPModel(config))


def llava():
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 12},
        image_token_index=60,
    )
    return redraw(transformers.LlavaForConditionalGeneration(config))


MODELS = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "clip": clip,
    "llava": llava,
}


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_there_and_back(tmp_path, kind, dtype):
    hf = MODELS[kind]().to(dtype)
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="8kB")
    a = zoo.load(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    b = zoo.load(tmp_path / "ours")
    assert jax.tree.all(jax.tree.map(same_bits, a.params, b.params))
    export(tmp_path / "ours", tmp_path / "back")

    before, after = (read_weights(tmp_path / name) for name in ("theirs", "back"))
    assert set(before) == set(after)
    assert all(same_bits(before[name], after[name]) for name in before)
    again = type(hf).from_pretrained(tmp_path / "back", dtype="auto")
    want, found = hf.state_dict(), again.state_dict()
    assert set(want) == set(found)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype and bits(found[name]) == bits(tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float8_e5m2])
def test_what_torch_saves_is_read_without_it(tmp_path, dtype):
    base = torch.arange(24).to(dtype).reshape(4, 6)
    state = {"a": base, "t": base.t(), "row": base[1], "p": torch.nn.Parameter(torch.ones(3))}
    torch.save(state, tmp_path / "x.pth")
    found = read_weights(tmp_path)
    for name, tensor in state.items():
        assert np.asarray(found[name]).tobytes() == bits(tensor), name


def test_a_bin_of_transformers(tmp_path):
    hf = llama()
    hf.save_pretrained(tmp_path / "safe")
    want = zoo.load(tmp_path / "safe").params
    (tmp_path / "bin").mkdir()
    hf.config.save_pretrained(tmp_path / "bin")
    torch.save(hf.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    found = zoo.load(tmp_path / "bin").params
    assert jax.tree.all(jax.tree.map(same_bits, found, want))
    torch.save(hf, tmp_path / "bin" / "pytorch_model.bin")  # the object, not its weights
    with pytest.raises(ZooError, match="which is not needed for weights"):
        zoo.load(tmp_path / "bin")
    torch.save(
        hf.state_dict(),
        tmp_path / "bin" / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(ZooError, match="as PyTorch wrote before"):
        zoo.load(tmp_path / "bin")


@pytest.mark.parametrize("kind", MODELS)
def test_verify_without_a_processor(tmp_path, kind):
    hf = MODELS[kind]()
    hf.save_pretrained(tmp_path / "theirs")
    report = verify(tmp_path / "theirs")
    assert report.original == type(hf).__name__
    names = [line.name for line in report.lines]
    assert names[-1] == "text" or "logits" in names
    assert sum("layer" in name for name in names) == (4 if kind == "clip" else 2)
    assert report.worst < 1e-4


def test_verify_finds_what_differs(tmp_path, capsys):
    hf = llama()
    hf.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert cli.main(["verify", str(tmp_path / "ours"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["agrees"] and facts["lines"][-1]["name"] == "logits"
    assert cli.main(["verify", str(tmp_path / "ours"), "--tolerance", "0"]) == 1
    assert "DIFFERS from LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_verify_with_a_picture(tmp_path, kind):
    processor, _ = tiny_processors.FAMILIES[kind](tmp_path)
    config, model = (getattr(transformers, name) for name in end_to_end.CLASSES[kind])
    options = end_to_end.options_of(kind, processor)
    hf = redraw(model(config(**end_to_end.MODELS[kind], **options)))
    hf.save_pretrained(tmp_path)
    report = verify(tmp_path)
    names = [line.name for line in report.lines]
    assert any(name.startswith("tower layer") for name in names), names
    assert any(name.startswith("decoder layer") for name in names), names
    assert report.worst < 1e-4, report
