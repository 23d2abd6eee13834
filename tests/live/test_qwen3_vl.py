"""Qwen3-VL against transformers: patches, tower and its levels, logits, generation, gradients,
files.
"""

import json
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from tests.convert.checkpoint import same_bits
from tests.live import test_qwen_vl as qwen
from tests.live import tiny_processors
from tests.live.reference import close, redraw, state_of, torch, transformers
from tests.live.test_processors import SIZES, photograph
from zoo.convert.convert import convert
from zoo.convert.export import export
from zoo.convert.folder import read_weights
from zoo.generate.autoregressive import generate
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.registry import base, config, read_hf
from zoo.models.decoders.p_mod import PMoD
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig
from zoo.models.parts.layers.rope import RopeConfig
from zoo.processors.hf import load_processor
from zoo.processors.image_config import views_of
from zoo.processors.native import NativeSpec, Picture

KIND = "qwen3_vl"
IMAGE, VIDEO, START, END = qwen.IMAGE, qwen.VIDEO, qwen.START, qwen.END
COUNTS = {
    "qwen3_vl_2b": 2_127_532_032,
    "qwen3_vl_4b": 4_437_815_808,
    "qwen3_vl_8b": 8_767_123_696,
    "qwen3_vl_32b": 33_357_390_064,
}
"""Parameters by the original's own module."""
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPE |= {"rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
TEXT = {**qwen.TEXT, "num_hidden_layers": 3, "head_dim": 8, "rope_parameters": ROPE}
VISION = {
    "depth": 3,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 1],
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def original(**options) -> torch.nn.Module:
    """A small one of theirs."""
    sizes = {"text_config": TEXT, "vision_config": VISION, **IDS, **options}
    theirs = transformers.Qwen3VLConfig(**sizes)
    return redraw(transformers.Qwen3VLForConditionalGeneration(theirs))


@cache
def pair() -> SimpleNamespace:
    """The original and ours with the same weights."""
    hf = original()
    ours = read_hf(Fields(KIND, qwen.saved_config(hf)))
    model, table, state = ours.build(), base(KIND).table(ours), state_of(hf)
    params = jax.tree.map(jnp.asarray, table.load(state, qwen.shapes_of(ours)))
    spec = NativeSpec.of(ours)
    return SimpleNamespace(hf=hf, config=ours, model=model, table=table, params=params, spec=spec)


def prompts() -> tuple[list[list[int]], list[list[Picture]]]:
    """An image between texts, a text, two images, a video and an image; lengths differ.

    The video is a picture for each of its steps, between control tokens and behind a text that
    tells its time, as their processor writes it.
    """
    rng, spec = np.random.default_rng(5), pair().spec

    def text(n: int) -> list[int]:
        return rng.integers(1, 50, n).tolist()

    image, step = [START, IMAGE, END], [START, VIDEO, END]
    ids = [
        text(3) + image + text(4),
        text(6),
        text(1) + image + text(2) + image + text(5),
        [i for time in range(3) for i in [time + 1, *step]] + image + text(2),
    ]
    frames = rng.normal(size=(6, 16, 24, 3)).astype(np.float32)
    pictures = [
        [qwen.picture(spec, 0, (24, 40))],
        [],
        [qwen.picture(spec, 1, (16, 8)), qwen.picture(spec, 2, (40, 16))],
        [spec.picture(frames[i : i + 2], 0.7) for i in (0, 2, 4)]
        + [qwen.picture(spec, 3, (8, 64))],
    ]
    return ids, pictures


def theirs(ids: list, pictures: list, *, left: bool = False) -> dict:
    """The same prompts as transformers takes them, which knows one video where we have pictures."""
    inputs = qwen.theirs(pair().spec, ids, pictures, KIND, left)
    if "video_grid_thw" in inputs:
        inputs["video_grid_thw"] = torch.tensor([[3, 4, 6]])
    return inputs


def test_logits():
    p = pair()
    ids, pictures = prompts()
    inputs = theirs(ids, pictures)
    with torch.no_grad():
        p.hf.model.rope_deltas = None
        want = p.hf(**inputs).logits.numpy()
    got, valid = qwen.logits_of(p, p.params, qwen.ours(p.spec, ids, pictures))
    for row in range(len(ids)):
        real = inputs["attention_mask"][row].bool().numpy()
        close(got[row][valid[row]], want[row][real], what=f"row {row}")


def test_positions():
    ids, pictures = prompts()
    inputs = theirs(ids, pictures)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    want, _ = pair().hf.model.get_rope_index(
        *(inputs[name] for name in names), attention_mask=inputs["attention_mask"]
    )
    for row, shown in enumerate(pictures):
        got = pair().spec.positions(ids[row], shown, (IMAGE, VIDEO))
        real = inputs["attention_mask"][row].bool()
        np.testing.assert_array_equal(got, want[:, row, real].T.numpy())


def test_tower_and_its_levels():
    p = pair()
    sizes = [(8, 8), (16, 16), (24, 40), (48, 8), (40, 56)]  # tables of 5 x 5 shrink and grow
    shown = [qwen.picture(p.spec, i, size) for i, size in enumerate(sizes)]
    with torch.no_grad():
        patches = torch.tensor(np.concatenate([x.patches for x in shown]))
        want = p.hf.model.visual(patches, torch.tensor([x.grid for x in shown]))

    def encode(batch):
        visual = p.model.apply({"params": p.params}, batch, method="encode_image")
        return visual.tokens.tokens[:, 0], visual.tokens.mask[:, 0], visual.memory["taps"]

    for rows in ([shown], [shown[:2], shown[2:3], shown[3:]]):
        tokens, mask, taps = jax.jit(encode)(p.spec.pack(rows))
        close(tokens[mask], want.pooler_output, what=f"{len(rows)} rows")
        for level, expected in enumerate(want.deepstack_features):
            close(taps[level][mask], expected, what=f"{len(rows)} rows, level {level}")


def test_generation():
    p = pair()
    ids, pictures = prompts()
    steps = 8
    for rows in ([1], [0], [0, 1, 2, 3]):
        some, shown = [ids[r] for r in rows], [pictures[r] for r in rows]
        inputs = theirs(some, shown, left=True)
        options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
        want = p.hf.generate(**inputs, **options, pad_token_id=qwen.PAD)
        want = want[:, inputs["input_ids"].shape[1] :].numpy()
        batch = qwen.ours(p.spec, some, shown)
        got = generate(p.model, p.params, batch, max_new_tokens=steps, eos_id=())
        np.testing.assert_array_equal(got, want)
    assert len(np.unique(got)) > 5


def test_gradients():
    p = pair()
    ids, pictures = prompts()
    inputs, batch = theirs(ids, pictures), qwen.ours(p.spec, ids, pictures)
    weight = np.random.default_rng(0).normal(size=64).astype(np.float32)
    p.hf.zero_grad()
    p.hf.model.rope_deltas = None
    out = p.hf(**inputs).logits @ torch.tensor(weight)
    (torch.tanh(out) * inputs["attention_mask"]).sum().backward()
    want = {name: leaf.grad.numpy() for name, leaf in p.hf.named_parameters()}

    def loss(params):
        logits, valid = qwen.logits_of(p, params, batch)
        return jnp.sum(jnp.tanh(logits @ weight) * valid)

    grads = p.table.save(jax.jit(jax.grad(loss))(p.params))
    assert set(grads) == set(want)
    for key, leaf in want.items():
        if key.endswith("attn.qkv.bias"):  # that of the keys is 0 up to rounding
            keys = slice(len(leaf) // 3, 2 * len(leaf) // 3)
            grads[key], leaf = (np.delete(x, keys) for x in (grads[key], leaf))
        close(grads[key], leaf, 2e-4, key)


def test_files_there_and_back(tmp_path):
    hf = original(tie_word_embeddings=True).to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    loaded = zoo.load(tmp_path / "theirs").params
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert jax.tree.all(jax.tree.map(same_bits, loaded, zoo.load(tmp_path / "ours").params))
    export(tmp_path / "ours", tmp_path / "back")
    before, after = (read_weights(tmp_path / name) for name in ("theirs", "back"))
    assert set(before) == set(after)
    assert all(same_bits(before[name], after[name]) for name in before)
    again = type(hf).from_pretrained(tmp_path / "back", dtype="auto")
    want, found = hf.state_dict(), again.state_dict()
    assert set(want) == set(found)
    assert all(found[key].dtype == torch.bfloat16 for key in want)
    assert all(torch.equal(want[key], found[key]) for key in want)


# Pictures and prompts.


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},  # as published
        {"size": {"shortest_edge": 32 * 64, "longest_edge": 64 * 96}},
    ],
)
def test_patches_and_grids(settings):
    theirs = transformers.Qwen2VLImageProcessorPil(
        **settings, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    views = views_of({**theirs.to_dict(), "image_processor_type": "Qwen2VLImageProcessorFast"})
    spec = NativeSpec.of(config("qwen3_vl_8b"))
    for size in (*SIZES, (20, 3000)):
        picture = photograph(*size)
        expected = theirs(Image.fromarray(picture))
        ours = views.picture(picture, spec)
        assert [list(ours.grid)] == np.asarray(expected["image_grid_thw"]).tolist()
        assert np.array_equal(ours.patches, np.asarray(expected["pixel_values"]))


@pytest.mark.parametrize("family", ["qwen2_vl", KIND])
def test_a_video_in_a_prompt_is_refused(tmp_path, family):
    theirs, model = tiny_processors.FAMILIES[family](tmp_path)
    processor = load_processor(tmp_path, model)
    with pytest.raises(UsageError, match="shows a video, and pictures alone are read"):
        processor.expanded_ids(None, f"{theirs.video_token} What happens?", raw=True)


def test_frames_are_not_put_into_one_picture():
    spec = NativeSpec.of(config("qwen3_vl_tiny"))
    with pytest.raises(UsageError, match="a video of 3 frames: this model reads one picture for"):
        spec.picture(np.zeros((3, 8, 8, 3), np.float32))


# Configurations.


def test_rotary_axes_take_turns():
    rope = RopeConfig(sections=(24, 20, 20), interleaved=True)
    position = jnp.arange(3, dtype=jnp.float32)[None, None] + 1  # every axis at another place
    axes = np.asarray(rope.angles(128, position) / rope.angles(128, jnp.ones((1, 1))))[0, 0]
    np.testing.assert_allclose(axes[:6], [1, 2, 3, 1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(axes[57:], [1, 2, 3, 1, 1, 1, 1], rtol=1e-6)


def test_published_form():
    """The file of the 4B model, which is older than `rope_parameters`."""
    text = {"attention_bias": False, "attention_dropout": 0.0, "head_dim": 128}
    text |= {"hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728}
    text |= {"max_position_embeddings": 262144, "model_type": "qwen3_vl_text"}
    text |= {"num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8}
    text |= {"rms_norm_eps": 1e-6, "rope_theta": 5000000, "tie_word_embeddings": True}
    text |= {"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645}
    sections = {"mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    text["rope_scaling"] = {**sections, "rope_type": "default"}
    vision = {"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_size": 1024}
    vision |= {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "intermediate_size": 4096}
    vision |= {"model_type": "qwen3_vl", "num_heads": 16, "num_position_embeddings": 2304}
    vision |= {"out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2}
    whole = {"model_type": KIND, "text_config": text, "vision_config": vision}
    whole |= {"image_token_id": 151655, "video_token_id": 151656, "tie_word_embeddings": True}
    whole |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    assert read_hf(Fields(KIND, whole)) == config("qwen3_vl_4b")

    def refused(match: str, **changes) -> None:
        with pytest.raises(UsageError, match=match):
            read_hf(Fields(KIND, {**whole, **changes}))

    refused("novelty", novelty=1)
    refused("novelty", vision_config={**vision, "novelty": 1})
    refused("square number", vision_config={**vision, "num_position_embeddings": 2000})
    refused("hidden_act is 'gelu'", vision_config={**vision, "hidden_act": "gelu"})
    refused(
        "width 2048, the language model takes", vision_config={**vision, "out_hidden_size": 2048}
    )
    plain = {**text["rope_scaling"], "mrope_interleaved": False}
    refused("mrope_interleaved is False", text_config={**text, "rope_scaling": plain})


@pytest.mark.parametrize("levels", [(3, 1), (0, 2), (2, 2), (5,)])
def test_levels_that_the_tower_does_not_have(levels):
    with pytest.raises(ValueError, match="want rising depths of the tower, 1 to 4"):
        config("qwen3_vl_tiny", levels=levels)


def test_levels_are_added_outside_of_policies():
    """Where a layer runs a part of its tokens, all image tokens get their level before it."""
    plan = config("qwen3_vl_tiny", policies=(PMoD(),)).plan()
    names = [tuple(policy.name for policy in step.policies) for step in plan]
    assert names == [(), ("add_tap", "router"), ("add_tap", "router"), ("router",)]


def original_of(ours: QwenVLConfig) -> torch.nn.Module:
    """The original of these sizes, without memory."""
    decoder, tower = ours.decoder, ours.tower
    text = {
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.context,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": decoder.rope.theta,
            "mrope_section": list(decoder.rope.sections),
        },
    }
    vision = {
        "depth": tower.depth,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "out_hidden_size": decoder.width,
        "deepstack_visual_indexes": [level - 1 for level in ours.levels],
    }
    sizes = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=decoder.tie_embeddings
    )
    with torch.device("meta"):
        return transformers.Qwen3VLForConditionalGeneration(sizes)


@pytest.mark.parametrize("name", COUNTS)
def test_full_sizes(name):
    ours = config(name)
    shapes, hf = qwen.shapes_of(ours), original_of(ours)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]
    assert sum(leaf.numel() for leaf in hf.parameters()) == COUNTS[name]
    want = {key: tuple(leaf.shape) for key, leaf in hf.state_dict().items()}
    if ours.decoder.tie_embeddings:
        del want["lm_head.weight"]
    assert base(KIND).table(ours).shapes(shapes) == want
    assert read_hf(Fields(KIND, json.loads(hf.config.to_json_string()))) == ours
