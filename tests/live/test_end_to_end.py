"""From pictures and a conversation to logits: their processor and model against ours."""

import jax
import numpy as np
import pytest
from PIL import Image

from tests.live import test_llava_family as family
from tests.live import tiny_processors as tiny
from tests.live.reference import close, redraw, state_of, torch, transformers
from tests.live.test_processors import SIZES, photograph, turn
from zoo.models.core import registry
from zoo.models.core.hf import Fields
from zoo.processors.hf import load_processor

TEXT = {**family.LLAMA, "vocab_size": 460, "max_position_embeddings": 512}
QWEN = {**TEXT, "model_type": "qwen2"}
CLIP = {**family.CLIP, "image_size": 28, "patch_size": 14}
SIGLIP = {**family.SIGLIP, "image_size": 28, "patch_size": 14, "vision_use_head": False}
INTERN = {**family.INTERN, "image_size": [28, 28], "patch_size": [14, 14]}
NATIVE = {"depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16}
NATIVE |= {"out_hidden_size": 24, "window_size": 56, "fullatt_block_indexes": [1]}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}
LEVELS = {"depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16}
LEVELS |= {"out_hidden_size": 24, "num_position_embeddings": 9, "deepstack_visual_indexes": [0]}
MODELS = {
    "llava": {"vision_config": CLIP, "text_config": TEXT},
    "llava_onevision": {"vision_config": SIGLIP, "text_config": QWEN},
    "internvl": {"vision_config": INTERN, "text_config": QWEN},
    "qwen2_5_vl": {"vision_config": NATIVE, "text_config": {**QWEN, "rope_parameters": ROPE}},
    "qwen3_vl": {
        "vision_config": LEVELS,
        "text_config": {**TEXT, "model_type": "qwen3_vl_text", "head_dim": 6}
        | {"rope_parameters": {**ROPE, "mrope_interleaved": True}},
    },
}
CLASSES = {
    **family.CLASSES,
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
}


def options_of(kind: str, processor) -> dict:
    """The fields of a configuration that name tokens and tiles of `processor`."""
    names = {"image_token_id": processor.image_token_id}
    if kind.startswith("llava"):
        names = {"image_token_index": processor.image_token_id}
    if hasattr(processor, "video_token_id"):
        key = "video_token_index" if kind.startswith("llava") else "video_token_id"
        names[key] = processor.video_token_id
    if kind.startswith("qwen"):
        ids = map(processor.tokenizer.convert_tokens_to_ids, ("<|vision_start|>", "<|vision_end|>"))
        names |= zip(("vision_start_token_id", "vision_end_token_id"), ids, strict=True)
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    more = {} if pinpoints is None else {"image_grid_pinpoints": pinpoints}
    if kind == "llava_onevision":
        more["vision_aspect_ratio"] = processor.vision_aspect_ratio
    return {**names, **more}


@pytest.mark.parametrize("kind", MODELS)
def test_pictures_and_conversations_give_the_logits_of_transformers(tmp_path, kind):
    processor, _ = tiny.FAMILIES[kind](tmp_path)
    config, model = (getattr(transformers, name) for name in CLASSES[kind])
    torch.manual_seed(0)
    hf = redraw(model(config(**MODELS[kind], **options_of(kind, processor))))

    fields = Fields(kind, {**hf.config.to_dict(), "architectures": [model.__name__]})
    ours = registry.read_hf(fields)
    base = registry.base_of(kind)
    params = base.table(ours).load(family.renamed(state_of(hf), base), family.shapes(ours))

    pictures = [photograph(*size) for size in SIZES[:3]]
    shown = [pictures[:1], pictures[1:], []]
    conversations = [
        [turn("user", given, text)] for given, text in zip(shown, ("Why?", "", "Hi"), strict=True)
    ]
    batch = load_processor(tmp_path, ours).encode_prompt(shown, conversations)
    found, _ = jax.jit(
        lambda batch: ours.build().apply({"params": params}, batch, room=1, method="prefill")
    )(batch)
    for row, given, messages in zip(found, shown, conversations, strict=True):
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"images": [Image.fromarray(x) for x in given]} if given else {},
        )
        inputs = {
            name: torch.tensor(np.asarray(value))
            for name, value in inputs.items()
            if name not in ("num_patches", "attention_mask")
        }
        with torch.no_grad():
            close(row, hf(**inputs).logits[0, -1], what=f"{len(given)} pictures")
