"""The LLaVA family against transformers: logits, decoding, gradients, conversion, sizes.

Every assembly gets one batch: rows of text, pictures and videos, each of them a list of ids and
`Picture`s. `theirs` turns a row into expanded ids, `ours` the batch into a compact one.
"""

import dataclasses
import functools
import re
from dataclasses import dataclass
from types import MethodType, SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, torch, transformers
from zoo.models.core import registry
from zoo.models.core.hf import Fields
from zoo.models.core.tree import flatten_dict, size_by_part
from zoo.processors import tiling

SIDE, PATCH, Q = 16, 4, 16
IMAGE, VIDEO, PAD, STEPS = 60, 61, 0, 3
RESOLUTIONS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "num_hidden_layers": 2}
INTERN = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [SIDE, SIDE],
    "patch_size": [PATCH, PATCH],
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": None}
QWEN2 = {**LLAMA, "model_type": "qwen2"}


@dataclass(frozen=True, eq=False)
class Picture:
    """Random tiles [n, 16, 16, 3] and the reading of their tokens."""

    reading: tiling.Reading
    size: tuple[int, int] = (0, 0)
    video: bool = False
    seed: int = 0

    @property
    def tiles(self):
        rng = np.random.default_rng(self.seed)
        return rng.normal(size=(self.reading.tiles, SIDE, SIDE, 3)).astype(np.float32)


def whole(tokens=Q, tiles=1, seed=0, **options):
    return Picture(tiling.whole_tiles(tiles, tokens, **options), seed=seed)


def tiled(size, seed=0, max_tiles=None):
    resolutions = [tuple(pair) for pair in RESOLUTIONS]
    grid = (SIDE // PATCH,) * 2
    reading = tiling.anyres(size, resolutions, tile=SIDE, grid=grid, max_tiles=max_tiles)
    return Picture(reading, size, seed=seed)


def video(frames, seed=0):
    return Picture(tiling.pooled_frames(frames, (SIDE // PATCH,) * 2), video=True, seed=seed)


@dataclass(frozen=True)
class Assembly:
    """One tiny model and its batch."""

    kind: str
    options: dict
    rows: list
    tokens: int = Q


def llava(**options):
    tokens = Q + (options.get("vision_feature_select_strategy") == "full")
    rows = [
        [5, 6, whole(tokens, seed=1), 7, whole(tokens, seed=2), 8, 9],
        [5, whole(tokens, seed=3), 4],
        [5, 6, 7, 8],
    ]
    options = {"vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE, **options}
    return Assembly("llava", options, rows, tokens)


def siglip_llava():
    """As the interleaved models: SigLIP with its pooling head, which nobody reads."""
    made = llava(vision_config=SIGLIP, text_config=QWEN2, vision_feature_layer=-1)
    return dataclasses.replace(
        llava(), options={**made.options, "vision_feature_select_strategy": "full"}
    )


def llava_next():
    rows = [
        [5, 6, tiled((30, 31), seed=1), 7, tiled((11, 40), seed=2), 8, 9],
        [5, tiled((50, 13), seed=3), 4],
        [5, 6, 7, 8],
        [tiled((7, 9), seed=4), 4, 5],
    ]
    options = {"vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE}
    return Assembly("llava_next", {**options, "image_grid_pinpoints": RESOLUTIONS}, rows)


def llava_onevision():
    """Two tiles at most, so that four are reduced; several pictures; videos; a tied head."""
    rows = [
        [5, tiled((30, 23), seed=1, max_tiles=2), 8, 9],
        [5, whole(seed=2, newline=True), 6, whole(seed=3, newline=True), 4],
        [5, 6, 7, 8],
        [tiled((9, 40), seed=4, max_tiles=2), 4, 5],
        [3, video(3, seed=5), 4, 5],
    ]
    options = {
        "vision_config": {**SIGLIP, "vision_use_head": False},
        "text_config": {**QWEN2, "tie_word_embeddings": True},
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": RESOLUTIONS,
        "vision_aspect_ratio": "anyres_max_2",
    }
    return Assembly("llava_onevision", options, rows)


def internvl(**vision):
    rows = [
        [5, 6, whole(4, tiles=3, seed=1), 7, whole(4, seed=2), 8, 9],
        [5, whole(4, tiles=2, seed=3), 4],
        [5, 6, 7, 8],
    ]
    options = {"vision_config": {**INTERN, **vision}, "text_config": QWEN2}
    return Assembly(
        "internvl", {**options, "image_token_id": IMAGE, "tie_word_embeddings": False}, rows, 4
    )


ASSEMBLIES = {
    "llava": llava(),
    "llava layers": llava(
        vision_feature_layer=[-2, 1],
        vision_feature_select_strategy="full",
        multimodal_projector_bias=False,
        projector_hidden_act="gelu_pytorch_tanh",
        text_config={**MISTRAL, "tie_word_embeddings": True},
    ),
    "llava siglip": siglip_llava(),
    "next": llava_next(),
    "onevision": llava_onevision(),
    "internvl": internvl(attention_bias=True),
    "internvl 6b": internvl(norm_type="rms_norm", use_qk_norm=True, use_mean_pooling=False),
}
CLASSES = {
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
    "llava_next": ("LlavaNextConfig", "LlavaNextForConditionalGeneration"),
    "llava_onevision": ("LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration"),
    "internvl": ("InternVLConfig", "InternVLForConditionalGeneration"),
}


def renamed(state, base):
    """A state dict under the names of the key table."""
    out = {}
    for key, array in state.items():
        for pattern, replacement in base.renames:
            key = re.sub(pattern, replacement, key)
        out[key] = array
    return out


def shapes(config):
    variables = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    return nn.unbox(variables)["params"]


def original(assembly):
    """Their model, with parameters drawn anew."""
    config, model = (getattr(transformers, name) for name in CLASSES[assembly.kind])
    torch.manual_seed(0)
    return redraw(model(config(**assembly.options)))


@functools.cache
def converted(name):
    """Their model, our configuration and parameters."""
    hf = original(ASSEMBLIES[name])
    config = registry.read_hf(Fields(name, hf.config.to_dict()))
    base = registry.base_of(hf.config.model_type)
    state = renamed(state_of(hf), base)
    return hf, config, base.table(config).load(state, shapes(config))


def theirs(hf, row):
    """Their logits [L, V] of one row."""
    ids, pictures = [], []
    for item in row:
        if isinstance(item, Picture):
            ids += [VIDEO if item.video else IMAGE] * item.reading.size
            pictures.append(item)
        else:
            ids.append(item)
    inputs = {"input_ids": torch.tensor([ids])}
    images = [picture for picture in pictures if not picture.video]
    channels_first = lambda picture: torch.tensor(picture.tiles.transpose(0, 3, 1, 2))
    if images and images[0].size == (0, 0) and hf.config.model_type != "llava_onevision":
        inputs["pixel_values"] = torch.cat([channels_first(image) for image in images])
    elif images:
        most = max(image.reading.tiles for image in images)
        pad = lambda x: torch.nn.functional.pad(x, (0, 0) * 3 + (0, most - len(x)))
        inputs["pixel_values"] = torch.stack([pad(channels_first(image)) for image in images])
        inputs["image_sizes"] = torch.tensor([image.size for image in images])
        if hf.config.model_type == "llava_onevision":
            inputs["batch_num_images"] = torch.tensor([len(images)])
    for picture in pictures:
        if picture.video:
            inputs["pixel_values_videos"] = channels_first(picture)[None]
    return hf(**inputs).logits[0]


def ours(assembly):
    """The compact batch of all rows."""
    rows = [[IMAGE if isinstance(x, Picture) else x for x in row] for row in assembly.rows]
    pictures = [[item for item in row if isinstance(item, Picture)] for row in assembly.rows]
    packed = tiling.pack([[p.reading for p in row] for row in pictures], tokens=assembly.tokens)
    prompts = tiling.pad_prompts(rows, image_id=IMAGE, pad_id=PAD)
    pixels = tiling.stack_tiles([[p.tiles for p in row] for row in pictures])
    return {**packed, **prompts, "pixels": pixels}


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
    """Logits [B, L, V] and which of them count [B, L]."""
    model = config.build()
    out = model.apply({"params": params}, batch)
    return model.apply({"params": params}, out.hidden, method="head"), out.tokens.valid


@functools.partial(jax.jit, static_argnums=0)
def prefill(config, params, batch):
    return config.build().apply({"params": params}, batch, room=STEPS, method="prefill")


@functools.partial(jax.jit, static_argnums=0)
def decode(config, params, ids, cache):
    return config.build().apply({"params": params}, ids, cache, method="decode")


TRAINED = ("llava", "next")


@pytest.mark.parametrize("name", [name for name in ASSEMBLIES if name not in TRAINED])
def test_logits(name):
    """At every token of every row, in a batch with different numbers of images."""
    hf, config, params = converted(name)
    assembly = ASSEMBLIES[name]
    logits, valid = forward(config, params, ours(assembly))
    for b, row in enumerate(assembly.rows):
        with torch.no_grad():
            close(logits[b][valid[b]], theirs(hf, row), what=f"row {b}")


@pytest.mark.parametrize("name", ["llava", "next", "onevision", "internvl"])
def test_greedy_decoding(name):
    hf, config, params = converted(name)
    assembly = ASSEMBLIES[name]
    logits, cache = prefill(config, params, ours(assembly))
    got = [np.asarray(logits.argmax(-1))]
    while len(got) < STEPS:
        logits, cache = decode(config, params, got[-1][:, None], cache)
        got.append(np.asarray(logits.argmax(-1)))
    for b, row in enumerate(assembly.rows):
        row, want = list(row), []
        for _ in range(STEPS):
            with torch.no_grad():
                want.append(int(theirs(hf, row)[-1].argmax()))
            row.append(want[-1])
        assert [ids[b] for ids in got] == want


@pytest.mark.parametrize("name", TRAINED)
def test_logits_and_gradients(name):
    """Of every parameter, from all logits of all rows."""
    hf, config, params = converted(name)
    assembly, batch = ASSEMBLIES[name], ours(ASSEMBLIES[name])
    rng = np.random.default_rng(7)
    weight = rng.normal(size=(len(assembly.rows), 400, 64)).astype(np.float32)

    hf.zero_grad()
    their_logits = [theirs(hf, row) for row in assembly.rows]
    for row, logits in zip(weight, their_logits, strict=True):
        (logits * torch.tensor(row[: len(logits)])).sum().backward()
    grads = {
        key: np.zeros(leaf.shape, np.float32) if leaf.grad is None else leaf.grad.numpy()
        for key, leaf in hf.named_parameters()
    }
    base = registry.base_of(assembly.kind)
    want = flatten_dict(base.table(config).load(renamed(grads, base), params))

    def loss(params):
        logits, valid = forward(config, params, batch)
        place, rows = jnp.cumsum(valid, -1) - 1, jnp.arange(len(valid))[:, None]
        return jnp.where(valid[..., None], logits * jnp.asarray(weight)[rows, place], 0).sum(), (
            logits,
            valid,
        )

    got, (logits, valid) = jax.jit(jax.grad(loss, has_aux=True))(params)
    for b, original_logits in enumerate(their_logits):
        close(logits[b][valid[b]], original_logits, what=f"row {b}")
    dead = {path for path, grad in flatten_dict(got).items() if not np.abs(grad).max() > 0}
    assert dead == {tuple(path.split("/")) for path in config.unread}
    for path, grad in flatten_dict(got).items():
        if path[-2:] == ("k", "bias"):  # changes no softmax: the gradient is rounding noise
            assert max(np.abs(grad).max(), np.abs(want[path]).max()) < 1e-4
        else:
            close(grad, want[path], what="/".join(path))


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_the_checkpoint_is_what_they_write(name, tmp_path):
    """Key for key and bit for bit."""
    from safetensors.numpy import load_file

    hf, config, params = converted(name)
    hf.save_pretrained(tmp_path)
    want = load_file(tmp_path / "model.safetensors")
    base = registry.base_of(hf.config.model_type)
    got = base.table(config).save(params)
    assert set(got) == set(want) and set(renamed(want, base)) == set(want)
    for key, array in want.items():
        np.testing.assert_array_equal(got[key], array, key)
    older = {
        re.sub(r"^vision_tower\.(?=embed|enc|pre|post|head)", "vision_tower.vision_model.", k)
        for k in want
    }
    assert set(renamed(dict.fromkeys(older), base)) == set(want)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("llava_1_5_7b", 7_063_427_072),
        ("llava_next_mistral_7b", 7_566_747_648),
        ("llava_onevision_qwen2_0_5b", 893_675_552),
        ("internvl3_1b", 938_193_024),
    ],
)
def test_published_sizes(name, number):
    """Keys and shapes of a whole checkpoint, and the number of its parameters."""
    base, config = registry.base(name), registry.config(name)
    tower, decoder = config.tower, config.decoder
    kind = "mistral" if "mistral" in name else "qwen2" if decoder.qkv_bias else "llama"
    text = {
        "model_type": kind,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "tie_word_embeddings": decoder.tie_embeddings,
    }
    options = {"text_config": text}
    if tower.layer_scale is not None:
        options |= {"vision_config": {"attention_bias": True}, "tie_word_embeddings": False}
    config_class, model_class = (getattr(transformers, n) for n in CLASSES[base.slug])
    with torch.device("meta"):
        hf = model_class(config_class(**options))
    assert sum(leaf.numel() for leaf in hf.parameters()) == number
    params = shapes(config)
    assert size_by_part(params)["total"] == number
    table = base.table(config)
    want = renamed({key: tuple(leaf.shape) for key, leaf in hf.state_dict().items()}, base)
    assert table.shapes(params) == {k: s for k, s in want.items() if k not in table.aliases}


def their_tokens(processor, size, grid, **facts):
    """The number of vision tokens that a processor of theirs counts for a picture."""
    names = ("_get_number_of_features", "_get_unpadded_features")
    fake = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=facts.pop("resolutions")), **facts
    )
    for name in names:
        setattr(fake, name, MethodType(getattr(processor, name), fake))
    return fake._get_number_of_features(*size, *grid)


def test_the_processors_count_the_same_tokens():
    """For many shapes, down to single rows of pixels."""
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    rng = np.random.default_rng(3)
    drawn = [tuple(int(n) for n in np.exp(rng.uniform(0, 8, 2))) for _ in range(300)]
    nexts = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    ones = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
    for size in [size for size in drawn if 1 / 40 < size[0] / size[1] < 40]:
        reading = tiling.anyres(size, nexts, tile=336, grid=(24, 24))
        want = their_tokens(
            transformers.LlavaNextProcessor,
            size,
            (336, 336),
            resolutions=nexts,
            patch_size=14,
            num_additional_image_tokens=0,
        )
        assert reading.size == want, size
        best = tiling.select_best_resolution(size, nexts)
        image = np.zeros((3, *size))
        fitted = get_patch_output_size(image, best, ChannelDimension.FIRST)
        assert tiling.fitted_box(size, best).size == fitted, size

        reading = tiling.anyres(size, ones, tile=384, grid=(27, 27), max_tiles=9)
        want = their_tokens(
            transformers.LlavaOnevisionProcessor,
            size,
            (384, 384),
            resolutions=ones,
            num_image_tokens=729,
            vision_aspect_ratio="anyres_max_9",
        )
        assert reading.size == want, size
        columns, rows = get_optimal_tiled_canvas(size, (448, 448), 1, 12)
        assert tiling.tile_grid(size, tile=448) == (rows, columns), size
