"""The vision transformer against the classes of transformers and timm, through the key tables."""

import dataclasses
import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.live.reference import close, redraw, state_of, timm, torch, transformers
from zoo.models.base import dinov2, internvl, timm_vit, vit, vit_mae
from zoo.models.core import registry
from zoo.models.core.hf import Fields
from zoo.models.parts.layers.resize import (
    resize_area,
    resize_bicubic,
    resize_bilinear,
    resize_nearest,
)
from zoo.models.parts.towers.hub import read_clip_vision, read_siglip_vision
from zoo.models.parts.towers.vit import ViTConfig, clip_table, embeddings_table

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
EAGER = {"attn_implementation": "eager"}


def tower(read):
    """Reader and table of a bare tower."""
    return lambda config: read(Fields("test", config)), clip_table


def model(base, read=None):
    """A base file's whole encoder or classifier."""
    return lambda config: (read or base.read)(Fields("test", config)), base.table


INTERNVL = (
    lambda config: internvl.read_vision(Fields("test", config)),
    lambda config: embeddings_table(config, internvl._LAYER),
)

# name: (class of transformers, its configuration, (reader, table))
CASES = {
    "clip": ("CLIPVision", {"intermediate_size": 32}, tower(read_clip_vision)),
    "siglip": ("SiglipVision", {"intermediate_size": 40}, tower(read_siglip_vision)),
    "siglip-trimmed": (
        "SiglipVision",
        {"intermediate_size": 40, "image_size": 18, "vision_use_head": False},
        tower(read_siglip_vision),
    ),
    "dinov2": ("Dinov2", {"mlp_ratio": 3, "layerscale_value": 0.5}, model(dinov2)),
    "dinov2-gated": (
        "Dinov2",
        {"use_swiglu_ffn": True, "use_mask_token": False, "qkv_bias": False},
        model(dinov2),
    ),
    "dinov2-registers": (
        "Dinov2WithRegisters",
        {"num_register_tokens": 3},
        model(dinov2, dinov2.read_with_registers),
    ),
    "vit": ("ViT", {"intermediate_size": 32}, model(vit)),
    "internvl": (
        "InternVLVision",
        {"intermediate_size": 32, "attention_bias": True},
        INTERNVL,
    ),
    "internvl-norms": (
        "InternVLVision",
        {
            "intermediate_size": 32,
            "norm_type": "rms_norm",
            "use_qk_norm": True,
            "use_mean_pooling": False,
            "use_mask_token": True,
        },
        INTERNVL,
    ),
}
RESIZED = {"clip", "siglip", "vit"}
"""Those of theirs that resize their positions only when they are told to."""


def pixels(height, width, seed=1):
    """Two random images."""
    return np.random.default_rng(seed).normal(size=(2, height, width, 3)).astype(np.float32)


def theirs(images):
    """Images as the originals want them."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def published(module, folder):
    """What `save_pretrained` writes: tensors, in the layout of the hub, and `config.json`."""
    module.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    state = load_file(folder / "model.safetensors")
    for pattern, name in vit_mae.RENAMES if config["model_type"] == "vit_mae" else ():
        state = {re.sub(pattern, name, key): leaf for key, leaf in state.items()}
    return state, config


def gradients(module, folder):
    """{key of the hub: gradient}."""
    with torch.no_grad():
        for leaf in module.parameters():
            leaf.copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return published(module, folder)[0]


def shapes(config, images):
    """Shapes of the parameters, without boxes."""
    batch = images if isinstance(config, ViTConfig) else {"pixels": images}
    return nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), batch)["params"])


def load(table, state, config, images):
    """Our parameters; the way back must give the same checkpoint."""
    params = table.load(state, shapes(config, images))
    back = table.save(params)
    assert set(back) == set(state)
    assert all(np.array_equal(back[key], state[key]) for key in state)
    return params


def run(config, params, images, **options):
    """Features and pooled vector of either kind of configuration."""
    if isinstance(config, ViTConfig):
        features = config.build().apply({"params": params}, images, **options)
        return features, features.cls
    out = config.build().apply({"params": params}, {"pixels": images}, **options)
    return out.features, out.pooled


def sequence(features):
    """All tokens of the tower's output, but registers."""
    if features.taps[0].shape[1] == features.tokens.shape[1]:
        return features.tokens
    return jnp.concatenate([features.cls[:, None], features.tokens], 1)


def close_gradients(got, want):
    """As `close`; those that are zero in exact arithmetic, as of key biases, are noise."""
    noise = 1e-4 * max(np.abs(leaf).max() for leaf in want.values())
    for key in want:
        if np.abs(want[key]).max() > noise or np.abs(got[key]).max() > noise:
            close(got[key], want[key], what=key)


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    kind, config, (read, table) = CASES[request.param]
    made = getattr(transformers, f"{kind}Config")(**(SIZES | config), **EAGER)
    hf = redraw(getattr(transformers, f"{kind}Model")(made))
    state, file = published(hf, tmp_path_factory.mktemp("theirs"))
    ours, side = read(file), (SIZES | config)["image_size"]
    images = pixels(side, side)
    params = load(table(ours), state, ours, images)
    return request.param, hf, ours, table(ours), params, images


def test_another_size(case):
    """A grid that shrinks on one side and grows on the other, with as many patches as before."""
    name, hf, config, _, params, _ = case
    images = pixels(8, 32)
    if isinstance(config, ViTConfig) and config.position_resize is None:
        with pytest.raises(ValueError, match=r"pixels: got \("):
            run(config, params, images)
        config = dataclasses.replace(config, position_resize="bicubic")
    told = {"interpolate_pos_encoding": True} if name.split("-")[0] in RESIZED else {}
    with torch.no_grad():
        want = hf(theirs(images), output_hidden_states=True, **told)
    bare = config if isinstance(config, ViTConfig) else config.tower
    got, _ = jax.jit(lambda p: run(bare, p.get("tower", p), images, taps=(0, 1), stop_after=1))(
        params
    )
    assert got.grid == (2, 8)
    close(got.taps[0], want.hidden_states[0], what="embedding")
    close(got.taps[1], want.hidden_states[1], what="hidden state")
    with pytest.raises(ValueError, match="multiples of 4"):
        run(config, params, pixels(20, 17))


def test_outputs_and_gradients(case, tmp_path):
    """Last hidden state, pooled vector, every hidden state, attention weights; every gradient."""
    name, hf, config, table, params, images = case
    want = hf(theirs(images), output_hidden_states=True, output_attentions=True)
    pooled = getattr(want, "pooler_output", None)
    loss = (want.last_hidden_state[:, -9:] ** 3).mean()
    (loss if pooled is None else loss + (pooled**2).mean()).backward()
    unnormed = name == "clip"  # whose last hidden state is before the norm

    def ours(params):
        features, vector = run(config, params, images, taps=(0, 1, 2), qk=(2,))
        last = features.taps[2] if unnormed else features.tokens
        loss = (last[:, -9:] ** 3).mean()
        return loss if pooled is None else loss + (vector**2).mean(), (features, vector)

    grads, (got, vector) = jax.jit(jax.grad(ours, has_aux=True))(params)
    prefix = got.taps[0].shape[1] - got.tokens.shape[1]
    last = want.last_hidden_state
    if prefix > 1:  # without the registers
        last = torch.cat([last[:, :1], last[:, prefix:]], 1)
    close(got.taps[2] if unnormed else sequence(got), last, what="last hidden state")
    if pooled is not None:
        close(vector, pooled, what="pooled")
    for layer in (0, 1, 2):
        if layer < 2 or not name.startswith("siglip"):  # whose last one is after the norm
            close(got.taps[layer], want.hidden_states[layer], what=f"hidden state {layer}")
    q, k = (np.asarray(x) for x in got.qk[2])
    logits = np.einsum("blhe,bshe->bhls", q, k) / q.shape[-1] ** 0.5
    close(torch.tensor(logits).softmax(-1).numpy(), want.attentions[1], what="attention")
    close_gradients(table.save(grads), gradients(hf, tmp_path))


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_classifiers(kind, tmp_path):
    """Logits of three classes."""
    made = getattr(transformers, f"{kind}Config")(**SIZES, num_labels=3)
    hf = redraw(getattr(transformers, f"{kind}ForImageClassification")(made))
    state, file = published(hf, tmp_path)
    config, images = registry.read_hf(Fields(kind, file)), pixels(16, 16)
    params = load(registry.base_of(file["model_type"]).table(config), state, config, images)
    got = jax.jit(lambda p: config.build().apply({"params": p}, {"pixels": images}))(params)
    with torch.no_grad():
        close(got.logits, hf(theirs(images)).logits)


def test_masked_autoencoder(tmp_path):
    """The encoder sees the patches with the smallest draws; the decoder reconstructs all."""
    decoder = {
        "decoder_hidden_size": 24,
        "decoder_num_attention_heads": 4,
        "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 40,
    }
    hf = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**SIZES, **decoder, intermediate_size=32, mask_ratio=0.6)
    )
    encoder = hf.vit.embeddings
    fresh = (encoder.position_embeddings, hf.decoder.decoder_pos_embed)
    for part in (encoder.patch_embeddings.projection, *fresh):
        part._is_hf_initialized = False  # the constructor leaves zeros there
    encoder.initialize_weights()
    hf.decoder.initialize_weights(16)
    state, file = published(hf, tmp_path)
    config, images = registry.read_hf(Fields("mae", file)), pixels(16, 16)
    table = vit_mae.table(config)
    init = jax.jit(config.build().init)
    fixed = table.save(nn.unbox(init(jax.random.key(0), {"pixels": images})["params"]))
    for key in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        close(fixed[key], state[key], 1e-6)

    state, _ = published(redraw(hf), tmp_path)
    params = load(table, state, config, images)
    draws = np.random.default_rng(2).random((2, 16)).astype(np.float32)
    want = hf(theirs(images), noise=torch.from_numpy(draws), output_hidden_states=True)
    (want.logits**2).mean().backward()

    def ours(params):
        out = config.build().apply({"params": params}, {"pixels": images}, draws=draws)
        return (out.patches**2).mean(), out

    grads, got = jax.jit(jax.grad(ours, has_aux=True))(params)
    close(got.patches, want.logits)
    np.testing.assert_array_equal(got.hidden, want.mask)
    assert got.features.tokens.shape == (2, 6, 16) and got.features.grid == (4, 4)
    close_gradients(table.save(grads), gradients(hf, tmp_path))


def test_timm(tmp_path):
    """Logits and features; another size with antialiased positions; key by key there and back."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
        dynamic_img_size=True,
        norm_layer=lambda width, **rest: torch.nn.LayerNorm(width, 1e-6),
    )
    redraw(model)
    config, images = registry.config("timm_vit_tiny"), pixels(16, 16)
    params = load(timm_vit.table(config), state_of(model), config, images)
    for images in (pixels(16, 16), pixels(8, 32)):
        got = jax.jit(lambda p, x: config.build().apply({"params": p}, {"pixels": x}))(
            params, images
        )
        with torch.no_grad():
            close(got.logits, model(theirs(images)))
            close(got.features.tokens, model.forward_features(theirs(images))[:, 1:])


TIMM = {"ti": "tiny", "s": "small", "b": "base", "l": "large"}


@pytest.mark.parametrize("name", [name for name in timm_vit.VARIANTS if "augreg" in name])
def test_sizes_of_timm(name):
    """The configuration from timm's name; every tensor as timm names and shapes it."""
    size, patch, tag = re.fullmatch(r"vit_([a-z]+)(\d+)_augreg\.?(.*)", name).groups()
    side, classes = 384 if tag == "384" else 224, 21_843 if tag == "in21k" else 1000
    original = f"vit_{TIMM[size]}_patch{patch}_{side}"
    config = registry.config(name)
    file = {"architecture": original, "num_classes": classes, "pretrained_cfg": {"tag": tag}}
    assert timm_vit.read(Fields("timm", file)) == config
    if tag and "b16" not in name:
        return  # the tensors are those without the tag, but for the table or the head
    with torch.device("meta"):
        model = timm.create_model(original, num_classes=classes)
    want = {key: tuple(leaf.shape) for key, leaf in model.state_dict().items()}
    ours = shapes(config, config.inputs(1)["pixels"])
    assert timm_vit.table(config).shapes(ours) == want


def sizes(width, depth, heads, **more):
    """Fields of transformers."""
    hidden = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return hidden | {"patch_size": 14, "image_size": 224} | more


_B, _H, _G = (768, 12, 12), (1280, 32, 16), (1536, 40, 24)
_DINO, _GATED = {"image_size": 518}, {"image_size": 518, "use_swiglu_ffn": True}
_IN1K = {"num_labels": 1000}
# What the files on the hub say; their classes have the other numbers as defaults.
HUB = {
    "vit_b16": ("ViTForImageClassification", sizes(*_B, **_IN1K, patch_size=16)),
    "vit_b32.384": (
        "ViTForImageClassification",
        sizes(*_B, **_IN1K, patch_size=32, image_size=384),
    ),
    "vit_h14.in21k": ("ViTModel", sizes(*_H, intermediate_size=5120)),
    "dinov2_s14": ("Dinov2Model", sizes(384, 12, 6, **_DINO)),
    "dinov2_g14": ("Dinov2Model", sizes(*_G, **_GATED)),
    "dinov2_b14_reg4": ("Dinov2WithRegistersModel", sizes(*_B, **_DINO)),
    "vit_mae_b16": ("ViTMAEForPreTraining", sizes(*_B, patch_size=16)),
    "vit_mae_h14": ("ViTMAEForPreTraining", sizes(*_H, intermediate_size=5120)),
}


@pytest.mark.parametrize("name", HUB)
def test_sizes_of_the_hub(name):
    """As many parameters as transformers counts, and the same configuration from its file."""
    kind, fields = HUB[name]
    made = getattr(transformers, kind.removesuffix("Model").split("For")[0] + "Config")(**fields)
    with torch.device("meta"):
        want = sum(leaf.numel() for leaf in getattr(transformers, kind)(made).parameters())
    config = registry.config(name)
    ours = shapes(config, config.inputs(1)["pixels"])
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == want
    file = made.to_dict() | {"architectures": [kind]}
    assert registry.read_hf(Fields(kind, file)) == config


METHODS = {
    "bicubic": (resize_bicubic, {}),
    "bicubic, antialias": (functools.partial(resize_bicubic, antialias=True), {"antialias": True}),
    "bilinear": (resize_bilinear, {}),
    "bilinear, antialias": (
        functools.partial(resize_bilinear, antialias=True),
        {"antialias": True},
    ),
    "nearest": (resize_nearest, {}),
    "area": (resize_area, {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_resizing(method):
    """As `interpolate` of torch, at odd sizes, up and down and both at once."""
    ours, options = METHODS[method]
    grid = np.random.default_rng(3).normal(size=(2, 13, 7, 3)).astype(np.float32)
    mode = method.split(",")[0]
    if mode.startswith("bi"):
        options = options | {"align_corners": False}
    for size in ((13, 7), (5, 3), (29, 16), (6, 15), (26, 14), (1, 1)):
        want = torch.nn.functional.interpolate(theirs(grid), size=size, mode=mode, **options)
        close(ours(grid, *size), want.permute(0, 2, 3, 1), 1e-5, f"{method} to {size}")
