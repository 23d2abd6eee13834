"""FastVLM against transformers, which has timm's encoder in it; and folding against timm's."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import zoo
from tests.convert.checkpoint import same_bits
from tests.live import tiny_processors as tiny
from tests.live.reference import close, state_of, timm, torch, transformers
from tests.live.test_processors import photograph, turn
from tests.live.test_vision import drawn, variables_of
from zoo.convert.convert import convert
from zoo.convert.export import export
from zoo.convert.folder import read_weights
from zoo.generate.autoregressive import generate
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.registry import read_hf
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.towers.fastvit import FastViTConfig, fuse
from zoo.models.vlm import fastvlm

SIZES = {
    "layers": (1, 1, 2, 1, 1),
    "embed_dims": (8, 8, 16, 32, 32),
    "mlp_ratios": (2, 2, 2, 2, 2),
}
TOWER = {
    "image_size": 128,
    "depths": (1, 1, 2, 1, 1),
    "widths": (8, 8, 16, 32, 32),
    "mlp_ratios": (2, 2, 2, 2, 2),
}
VISION = {
    "model_type": "timm_wrapper",
    "architecture": "fastvit_mci3",
    "do_pooling": True,
    "global_pool": "avg",
    "hidden_size": 64,
    "model_args": {"inference_mode": True, **SIZES},
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}
{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
STEPS = 8
QUESTION = "What differs?"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in a folder, as transformers writes it: its processor, its model, the folder."""
    folder = tmp_path_factory.mktemp("fastvlm")
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 128}, crop_size=128, image_mean=[0.0] * 3, image_std=[1.0] * 3
        ),
        tokenizer=tiny.qwen_tokenizer(image_token="<image>"),
        patch_size=64,
        chat_template=TEMPLATE,
    )
    config = transformers.FastVlmConfig(
        vision_config=VISION,
        text_config={**TEXT, "vocab_size": len(processor.tokenizer)},
        image_token_index=processor.image_token_id,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    theirs = drawn(transformers.FastVlmForConditionalGeneration(config))
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": 0}
    theirs.generation_config = transformers.GenerationConfig(**ends)
    processor.save_pretrained(folder)
    theirs.save_pretrained(folder)
    return processor, theirs, folder


def test_what_is_loaded_answers_as_transformers_does(saved):
    """Two pictures of four tokens each: ids, pixels, logits of every token, greedy answers."""
    processor, theirs, folder = saved
    pictures = [photograph(150, 200), photograph(180, 140)]
    messages = [turn("user", pictures, QUESTION)]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images": [Image.fromarray(picture) for picture in pictures]},
    )
    loaded = zoo.load(folder)
    assert loaded.config.tower.form == "released" and loaded.stats
    batch = loaded.processor.encode_prompt(pictures, QUESTION)
    ids = loaded.processor.expanded_ids(pictures, QUESTION)
    assert ids == inputs["input_ids"].tolist()
    pixels = np.moveaxis(batch["pixels"][0], -1, 1)
    np.testing.assert_array_equal(pixels, inputs["pixel_values"])
    assert pixels.max() <= 1
    with torch.no_grad():
        want = theirs(**inputs).logits
    close(loaded.logits(batch)[:, : len(ids[0])], want, what="logits")

    options = {"max_new_tokens": STEPS, "do_sample": False}
    new = theirs.generate(**inputs, **options)[0, len(ids[0]) :].tolist()
    assert len(set(new)) > 2
    ends = loaded.processor.stop_ids
    found = generate(loaded.model, loaded.variables, batch, max_new_tokens=STEPS, eos_id=ends)
    assert found[0, : len(new)].tolist() == new
    answer = loaded.generate(pictures, QUESTION, max_new_tokens=STEPS)
    assert answer == loaded.processor.decode(new)


def test_it_goes_back_as_it_was(saved, tmp_path):
    """Every tensor but the counts of batches, bit by bit; transformers takes it."""
    _, theirs, folder = saved
    done = convert(folder, tmp_path / "ours")
    assert done.dropped and all(name.endswith("num_batches_tracked") for name in done.dropped)
    export(tmp_path / "ours", tmp_path / "back")
    before, after = read_weights(folder), read_weights(tmp_path / "back")
    assert set(before) - set(after) == set(done.dropped) and set(after) < set(before)
    assert all(same_bits(before[name], after[name]) for name in after)
    again = type(theirs).from_pretrained(tmp_path / "back")
    want = theirs.state_dict()
    for name, leaf in again.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(leaf, want[name]), name


def test_branches_are_read_too(saved):
    """A tower that is not folded yet; `test_folding_is_timms` loads one."""
    fields = json.loads((saved[2] / "config.json").read_text())
    del fields["vision_config"]["model_args"]["inference_mode"]
    assert read_hf(Fields("fast_vlm", fields)).tower == FastViTConfig(**TOWER, form="branches")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_seq_length": 6}, "image_seq_length is 6; want the tokens of a square"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2; this zoo computes -1 only"),
        ({"new_kind_of_attention": 7}, "unknown fields .* new_kind_of_attention = 7"),
        ({"text_config": None}, "lacks 'text_config'"),
        ({"vision_config": None}, "lacks 'architecture'"),
        ({"vision_config": {**VISION, "hidden_size": 65}}, "hidden_size is 65"),
        (
            {"vision_config": {**VISION, "architecture": "resnet50.a1"}},
            "this zoo reads fastvit_mci3",
        ),
        (
            {"vision_config": {**VISION, "model_args": {"lkc_use_act": False}}},
            "vision_config.model_args: unknown fields .* lkc_use_act = False",
        ),
    ],
)
def test_what_is_not_understood_is_refused(saved, changes, message):
    fields = {**json.loads((saved[2] / "config.json").read_text()), **changes}
    with pytest.raises(UsageError, match=message):
        read_hf(Fields("fast_vlm", fields))


def test_folding_is_timms():
    """Every tensor, as timm's `reparameterize` leaves it."""
    theirs = timm.create_model("fastvit_mci3", num_classes=5, pretrained=False, **SIZES)
    branches = ClassifierConfig(FastViTConfig(**TOWER, form="branches"), "mean", num_classes=5)
    table = fastvlm.timm_table(branches)
    loaded = table.load(state_of(drawn(theirs)), variables_of(branches))
    found = jax.jit(fuse)(loaded)
    for module in theirs.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    one = ClassifierConfig(FastViTConfig(**TOWER), "mean", num_classes=5)
    ours = fastvlm.timm_table(one).save(found)
    want = {k: v for k, v in state_of(theirs).items() if not k.endswith("num_batches_tracked")}
    assert set(ours) == set(want)
    for key, leaf in ours.items():
        close(leaf, want[key], 1e-5, what=key)
