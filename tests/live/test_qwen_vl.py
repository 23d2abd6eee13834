"""Qwen2-VL and Qwen2.5-VL against transformers: positions, patches, tower, logits, generation,
gradients.
"""

import json
import re
from functools import cache
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.live.reference import close, redraw, state_of, torch, transformers
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.registry import base, read_hf
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig
from zoo.processors.lengths import bucket
from zoo.processors.native import NativeSpec, Picture, smart_resize

IMAGE, VIDEO, START, END, PAD = 60, 61, 58, 59, 0
CLASSES = {
    "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
}
KINDS = tuple(CLASSES)
COUNTS = {
    "qwen2_vl_2b": 2_208_985_600,
    "qwen2_vl_7b": 8_291_375_616,
    "qwen2_vl_72b": 73_405_560_320,
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen2_5_vl_32b": 33_452_718_336,
    "qwen2_5_vl_72b": 73_410_777_344,
}
"""Parameters of the hub's checkpoints."""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
SCALING = {
    "qwen2_vl": {"type": "mrope"},
    "qwen2_5_vl": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "depth": 3,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 24,
        "num_heads": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 3,
    },
}


@cache
def pair(kind: str) -> SimpleNamespace:
    """The original and ours with the same weights: embeddings are tied in one of the two."""
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    original = CLASSES[kind][0](
        text_config={**TEXT, "rope_theta": 1e4, "rope_scaling": scaling(kind)},
        vision_config={**VISION[kind], "patch_size": 4},
        tie_word_embeddings=kind == "qwen2_vl",
        **ids,
    )
    hf = redraw(CLASSES[kind][1](original))
    config = read_hf(Fields(kind, saved_config(hf)))
    model, table = config.build(), base(kind).table(config)
    shapes = shapes_of(config)
    state = {_rename(key, base(kind).renames): leaf for key, leaf in state_of(hf).items()}
    if config.decoder.tie_embeddings:
        del state["lm_head.weight"]
    params = jax.tree.map(jnp.asarray, table.load(state, shapes))
    spec = NativeSpec.of(config)
    return SimpleNamespace(
        hf=hf, config=config, model=model, table=table, params=params, spec=spec, state=state
    )


def scaling(kind: str) -> dict:
    """The `rope_scaling` of older files."""
    return {**SCALING[kind], "mrope_section": [1, 1, 2]}


def shapes_of(config: QwenVLConfig) -> dict:
    """Shapes of the parameters of a model."""
    return nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1)))[
        "params"
    ]


def saved_config(hf: torch.nn.Module) -> dict:
    """The `config.json` that `save_pretrained` writes."""
    return json.loads(hf.config.to_json_string())


def _rename(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, to in renames:
        key = re.sub(pattern, to, key)
    return key


def picture(spec: NativeSpec, seed: int, size: tuple[int, int], frames: int = 0) -> Picture:
    """A random image, or a video of so many frames."""
    shape = (frames or 1, *size, 3)
    pixels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return spec.picture(pixels, 0.7 if frames else None)


def prompts(spec: NativeSpec) -> tuple[list[list[int]], list[list[Picture]]]:
    """An image between texts, a text, two images, a video and an image; lengths differ."""
    rng = np.random.default_rng(5)

    def text(n: int) -> list[int]:
        return rng.integers(1, 50, n).tolist()

    image, video = [START, IMAGE, END], [START, VIDEO, END]
    ids = [
        text(3) + image + text(4),
        text(6),
        text(1) + image + text(2) + image + text(5),
        video + text(2) + image + text(1),
    ]
    pictures = [
        [picture(spec, 0, (24, 40))],
        [],
        [picture(spec, 1, (16, 8)), picture(spec, 2, (40, 16))],
        [picture(spec, 3, (16, 24), frames=5), picture(spec, 4, (8, 8))],
    ]
    return ids, pictures


def theirs(spec: NativeSpec, ids: list, pictures: list, kind: str, left: bool = False) -> dict:
    """The same prompts as transformers takes them."""
    rows = []
    for row, shown in zip(ids, pictures, strict=True):
        waiting, out = iter(shown), []
        for token in row:
            seen = token in (IMAGE, VIDEO)
            out += [token] * (spec.num_tokens(next(waiting).grid) if seen else 1)
        rows.append(out)
    length = max(map(len, rows))
    fills = [[0] * (length - len(row)) for row in rows]
    full = [f + [1] * len(r) if left else [1] * len(r) + f for r, f in zip(rows, fills)]
    input_ids = torch.tensor([f + r if left else r + f for r, f in zip(rows, fills)])
    modality = (input_ids == IMAGE) * 1 + (input_ids == VIDEO) * 2
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.tensor(full),
        "mm_token_type_ids": modality.int(),
    }
    images = [p for row in pictures for p in row if p.seconds is None]
    videos = [p for row in pictures for p in row if p.seconds is not None]
    for shown, name, grid in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if shown:
            batch[name] = torch.tensor(np.concatenate([p.patches for p in shown]))
            batch[grid] = torch.tensor([p.grid for p in shown])
    if videos and kind == "qwen2_5_vl":
        batch["second_per_grid_ts"] = torch.tensor([p.seconds for p in videos])
    if not images and not videos:
        del batch["mm_token_type_ids"]
    return batch


def ours(spec: NativeSpec, ids: list, pictures: list) -> dict:
    """The same prompts as our model takes them."""
    return spec.batch(ids, pictures, placeholders=(IMAGE, VIDEO), pad=PAD)


def logits_of(p: SimpleNamespace, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Logits and validity at every place of the expanded sequence."""

    def run(params, batch):
        output = p.model.apply({"params": params}, batch)
        logits = p.model.apply({"params": params}, output.hidden, method="head")
        return logits, output.tokens.valid

    return jax.jit(run)(params, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind):
    p = pair(kind)
    ids, pictures = prompts(p.spec)
    for rows in ([1], [0, 1, 2, 3]):
        some, shown = [ids[r] for r in rows], [pictures[r] for r in rows]
        with torch.no_grad():
            inputs = theirs(p.spec, some, shown, kind)
            p.hf.model.rope_deltas = None
            want = p.hf(**inputs).logits.numpy()
        got, valid = logits_of(p, p.params, ours(p.spec, some, shown))
        for row in range(len(rows)):
            real = inputs["attention_mask"][row].bool().numpy()
            close(got[row][valid[row]], want[row][real], what=f"{kind}, rows {rows}, row {row}")


@pytest.mark.parametrize("kind", KINDS)
def test_positions(kind):
    p = pair(kind)
    ids, pictures = prompts(p.spec)
    inputs = theirs(p.spec, ids, pictures, kind)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    extra = {"second_per_grid_ts": inputs.get("second_per_grid_ts")}
    want, _ = p.hf.model.get_rope_index(
        *(inputs[name] for name in names), **extra, attention_mask=inputs["attention_mask"]
    )
    for row, shown in enumerate(pictures):
        got = p.spec.positions(ids[row], shown, (IMAGE, VIDEO))
        real = inputs["attention_mask"][row].bool()
        np.testing.assert_array_equal(got, want[:, row, real].T.numpy())
    if kind == "qwen2_5_vl":
        assert got[:, 0].max() >= 4  # the third step of 0.7 s at 3 tokens per second


@pytest.mark.parametrize("kind", KINDS)
def test_tower(kind):
    p = pair(kind)
    sizes = [(8, 8), (16, 16), (24, 40), (48, 8), (40, 56)]
    shown = [picture(p.spec, i, size) for i, size in enumerate(sizes)]
    with torch.no_grad():
        patches = torch.tensor(np.concatenate([x.patches for x in shown]))
        want = p.hf.model.visual(patches, torch.tensor([x.grid for x in shown])).pooler_output
    want = np.split(want.numpy(), np.cumsum([p.spec.num_tokens(x.grid) for x in shown])[:-1])

    def encode(batch):
        return p.model.apply({"params": p.params}, batch, method="encode_image").tokens

    for rows in ([shown], [shown[:2], shown[2:3], shown[3:]]):
        tokens = jax.jit(encode)(p.spec.pack(rows))
        got = [tokens.tokens[i, 0][tokens.mask[i, 0]] for i in range(len(rows))]
        close(np.concatenate(got), np.concatenate(want), what=f"{kind}, {len(rows)} rows")


@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind):
    p = pair(kind)
    ids, pictures = prompts(p.spec)
    steps = 8
    prefill = jax.jit(lambda b: p.model.apply(v, b, room=steps, method="prefill"))
    decode = jax.jit(lambda i, c: p.model.apply(v, i, c, method="decode"))
    v = {"params": p.params}
    for rows in ([1], [0, 1, 2, 3]):
        some, shown = [ids[r] for r in rows], [pictures[r] for r in rows]
        inputs = theirs(p.spec, some, shown, kind, left=True)
        options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
        want = p.hf.generate(**inputs, **options, pad_token_id=PAD)
        want = want[:, inputs["input_ids"].shape[1] :].numpy()
        logits, cache = prefill(ours(p.spec, some, shown))
        got = []
        for _ in range(steps):
            got.append(np.asarray(logits.argmax(-1)))
            logits, cache = decode(got[-1][:, None], cache)
        np.testing.assert_array_equal(np.stack(got, 1), want)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    p = pair(kind)
    ids, pictures = prompts(p.spec)
    inputs = theirs(p.spec, ids, pictures, kind)
    batch = ours(p.spec, ids, pictures)
    weight = np.random.default_rng(0).normal(size=64).astype(np.float32)
    p.hf.zero_grad()
    p.hf.model.rope_deltas = None
    out = p.hf(**inputs).logits @ torch.tensor(weight)
    (torch.tanh(out) * inputs["attention_mask"]).sum().backward()
    want = {name: leaf.grad.numpy() for name, leaf in p.hf.named_parameters()}

    def loss(params):
        logits, valid = logits_of(p, params, batch)
        return jnp.sum(jnp.tanh(logits @ weight) * valid)

    grads = p.table.save(jax.jit(jax.grad(loss))(p.params))
    want = {_rename(key, base(kind).renames): leaf for key, leaf in want.items()}
    assert set(grads) == set(want)
    for key, leaf in want.items():
        if not key.endswith("k_proj.bias"):  # 0 up to rounding: softmax ignores a common shift
            close(grads[key], leaf, 2e-4, key)


@pytest.mark.parametrize("kind", KINDS)
def test_table_there_and_back(kind):
    p = pair(kind)
    back = p.table.save(p.params)
    assert set(back) == set(p.state)
    for key, leaf in p.state.items():
        np.testing.assert_array_equal(back[key], leaf)


def test_patches_of_images():
    processor = transformers.Qwen2VLImageProcessorPil()
    spec, rng = NativeSpec(), np.random.default_rng(0)
    mean, std = (np.array(x, np.float32) for x in (processor.image_mean, processor.image_std))
    for height, width in ((60, 201), (31, 30), (500, 333)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        edges = {"shortest_edge": 56 * 56, "longest_edge": 200 * 200}
        want = processor(image, return_tensors="np", size=edges)
        bounds = {"min_pixels": 56 * 56, "max_pixels": 200 * 200}
        target = smart_resize(height, width, factor=spec.factor, **bounds)
        small = np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC))
        got = spec.picture(((small / np.float32(255) - mean) / std)[None])
        assert got.grid == tuple(want["image_grid_thw"][0])
        np.testing.assert_allclose(got.patches, want["pixel_values"], atol=1e-6)


def test_patches_of_videos():
    spec, rng = NativeSpec(), np.random.default_rng(0)
    frames = rng.normal(size=(5, 56, 84, 3)).astype(np.float32)
    got = spec.picture(frames, 1.0)
    assert got.grid == (3, 4, 6)
    last = spec.picture(frames[4:])  # an odd last frame counts twice, as an image does
    np.testing.assert_array_equal(got.patches[-24:], last.patches)
    patch = got.patches[1].reshape(3, 2, 14, 14)  # channels, frames, rows, columns
    np.testing.assert_array_equal(patch, frames[:2, :14, 14:28].transpose(3, 0, 1, 2))


def test_smart_resize_is_theirs():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as want

    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (200, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        bounds = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
        assert smart_resize(height, width, **bounds) == want(height, width, **bounds)
    with pytest.raises(UsageError, match="201 x 1 "):
        smart_resize(201, 1, factor=28, min_pixels=1, max_pixels=10**6)


def test_buckets_are_few_and_near():
    assert [bucket(n) for n in (0, 1, 7, 8, 9, 15, 17, 33, 1000)] == [
        *(0, 1, 7, 8, 10, 16, 20, 40, 1024)
    ]
    sizes = {bucket(n) for n in range(1, 4097)}
    assert len(sizes) < 45
    assert all(n <= bucket(n) <= 1.25 * n for n in range(1, 4097))


def test_wrong_numbers_of_pictures():
    spec = NativeSpec(patch_size=4)
    shown = picture(spec, 0, (8, 8))
    with pytest.raises(UsageError, match="1 placeholders for 0 pictures"):
        ours(spec, [[1, IMAGE]], [[]])
    with pytest.raises(UsageError, match="0 placeholders for 1 pictures"):
        ours(spec, [[1]], [[shown]])
    with pytest.raises(UsageError, match="multiples of 8"):
        spec.picture(np.zeros((1, 12, 8, 3), np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_old_flat_configuration(kind):
    """Files of the hub, from before `text_config`, say the same."""
    p = pair(kind)
    new = saved_config(p.hf)
    flat = {key: value for key, value in new.items() if key != "text_config"}
    flat |= {**TEXT, "rope_theta": 1e4, "rope_scaling": scaling(kind)}
    flat |= {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": 32768}
    flat["vision_config"] = {
        **VISION[kind],
        "patch_size": 4,
        "in_chans": 3,
        "spatial_patch_size": 4,
    }
    assert read_hf(Fields(kind, flat)) == p.config
    assert read_hf(Fields(kind, {**flat, "text_config": {**new["text_config"]}})) == p.config
    with pytest.raises(UsageError, match="use_sliding_window"):
        read_hf(Fields(kind, {**flat, "use_sliding_window": True}))
    with pytest.raises(UsageError, match="dynamic"):
        read_hf(Fields(kind, {**flat, "rope_scaling": {"type": "dynamic", "factor": 4.0}}))
    with pytest.raises(UsageError, match="novelty"):
        read_hf(Fields(kind, {**flat, "novelty": 1}))


def original_of(config: QwenVLConfig, kind: str) -> torch.nn.Module:
    """The original of these sizes, without memory."""
    decoder, tower = config.decoder, config.tower
    text = {
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "vocab_size": decoder.vocab_size,
    }
    vision = {"depth": tower.depth, "num_heads": tower.num_heads}
    if kind == "qwen2_vl":
        ratio = tower.mlp_dim // tower.width
        vision |= {"embed_dim": tower.width, "hidden_size": decoder.width, "mlp_ratio": ratio}
    else:
        vision |= {"hidden_size": tower.width, "out_hidden_size": decoder.width}
        vision |= {"intermediate_size": tower.mlp_dim}
    tied = {"tie_word_embeddings": decoder.tie_embeddings}
    sizes = CLASSES[kind][0](text_config=text, vision_config=vision, **tied)
    with torch.device("meta"):
        return CLASSES[kind][1](sizes)


@pytest.mark.parametrize("name", COUNTS)
def test_full_sizes(name):
    kind = name.rpartition("_")[0]
    config = base(kind).variants[name]
    shapes, hf = shapes_of(config), original_of(config, kind)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]
    assert sum(leaf.numel() for leaf in hf.parameters()) == COUNTS[name]
    want = {_rename(k, base(kind).renames): tuple(v.shape) for k, v in hf.state_dict().items()}
    if config.decoder.tie_embeddings:
        del want["lm_head.weight"]
    assert base(kind).table(config).shapes(shapes) == want
