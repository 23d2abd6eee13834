"""CLIP and SigLIP against transformers."""

import dataclasses
import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, torch, transformers
from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.tree import size_by_part
from zoo.zeroshot import class_head, classify, judge

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 12,
}


def clip(**text):
    """CLIP; `text` changes its text tower."""
    act = {"hidden_act": text.pop("hidden_act", "quick_gelu")}
    config = transformers.CLIPConfig(
        text_config={**TEXT, **act, **text},
        vision_config={**VISION, **act},
        projection_dim=20,
    )
    return transformers.CLIPModel(config)


def siglip(**text):
    """SigLIP with image and text towers of one width."""
    config = transformers.SiglipConfig(
        text_config={**TEXT, "projection_size": 32, **text}, vision_config=VISION
    )
    return transformers.SiglipModel(config)


def shapes(config):
    variables = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    return nn.unbox(variables)["params"]


def converted(hf):
    """Our configuration, module and parameters of a redrawn model of theirs."""
    config = registry.read_hf(Fields("test", hf.config.to_dict()))
    table = registry.base_of(hf.config.model_type).table(config)
    params = table.load(state_of(hf), shapes(config))
    return config, config.build(), params, table


def run(model, params, *args, method=None):
    """`apply`, compiled."""
    return jax.jit(functools.partial(model.apply, method=method))({"params": params}, *args)


def texts(count=3, length=10, end=63, seed=0):
    """Ids with one `end` in each row, padding 1 after it, and the mask of what is not padding."""
    rng = np.random.default_rng(seed)
    ids, ends = rng.integers(2, 60, (count, length)), rng.integers(4, length, count)
    ends[0] = length - 1
    place = np.arange(length)
    ids[place == ends[:, None]] = end
    ids[place > ends[:, None]] = 1
    return ids.astype(np.int32), place <= ends[:, None]


def images(count=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 16, 16, 3)).astype(np.float32)


def asked(hf, pixels, ids, mask, **options):
    """What theirs answers."""
    return hf(
        pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2),
        input_ids=torch.tensor(ids).long(),
        attention_mask=None if mask is None else torch.tensor(mask).long(),
        **options,
    )


CASES = {
    "clip": (lambda: clip(eos_token_id=63), True),
    "clip_without_mask": (lambda: clip(eos_token_id=63, hidden_act="gelu"), False),
    "clip_old_end": (lambda: clip(eos_token_id=2), True),
    "siglip": (siglip, False),
    "siglip_with_mask": (siglip, True),
}


@pytest.mark.parametrize("name", CASES)
def test_embeddings_logits_and_hidden_states(name):
    make, is_masked = CASES[name]
    hf = redraw(make())
    _, model, params, _ = converted(hf)
    ids, mask = texts()
    mask = mask if is_masked else None
    pixels = images()
    with torch.no_grad():
        theirs = asked(hf, pixels, ids, mask, output_hidden_states=True)
    batch = {"pixels": pixels, "ids": ids} | ({} if mask is None else {"text_mask": mask})

    def both(model, batch):
        return model(batch), model.text(ids, mask=mask, taps=(0, 1, 2))

    ours, found = run(model, params, batch, method=both)
    close(ours.image, theirs.image_embeds, what="image")
    close(ours.text, theirs.text_embeds, what="text")
    close(ours.logits, theirs.logits_per_image, what="logits")
    seen = np.ones(ids.shape, bool) if mask is None else mask
    for depth, hidden in enumerate(theirs.text_model_output.hidden_states[:3]):
        close(found.taps[depth][seen], hidden.numpy()[seen], what=f"hidden state {depth}")
    last = theirs.text_model_output.last_hidden_state.numpy()
    close(found.tokens[seen], last[seen], what="last hidden state")


def test_the_first_end_counts_and_a_text_without_one_is_its_first_token():
    hf = redraw(clip(eos_token_id=63))
    _, model, params, _ = converted(hf)
    ids, _ = texts()
    ids[0], ids[1, 2:] = 5, 63  # none, and padding that is the end token
    with torch.no_grad():
        theirs = asked(hf, images(), ids, None).text_embeds
    close(run(model, params, ids, method="encode_text"), theirs)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_gradients_of_the_contrastive_loss(name):
    hf = redraw(CASES[name][0]())
    config, model, params, table = converted(hf)
    ids, mask = texts(count=2)
    mask = mask if CASES[name][1] else None
    pixels = images()
    loss = asked(hf, pixels, ids, mask, return_loss=True).loss
    loss.backward()
    batch = {"pixels": pixels, "ids": ids} | ({} if mask is None else {"text_mask": mask})

    def objective(params):
        logits = model.apply({"params": params}, batch).logits
        same = jnp.eye(2)
        if config.pairing == "sigmoid":
            return -jax.nn.log_sigmoid((2 * same - 1) * logits).sum() / 2
        rows, columns = (jax.nn.log_softmax(logits, axis) for axis in (0, 1))
        return -(same * (rows + columns)).sum() / 4

    ours, grads = jax.jit(jax.value_and_grad(objective))(params)
    close(ours, loss, what="loss")
    found = table.save(jax.tree.map(np.asarray, grads))
    given = dict(hf.named_parameters())
    largest = max(float(leaf.grad.abs().max()) for leaf in given.values())
    for key, leaf in given.items():
        error = np.abs(found[key] - leaf.grad.numpy()).max()
        assert error <= 1e-4 * max(largest, 1), f"{key}: {error}"


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_conversion_there_and_back_is_exact(name):
    hf = redraw(CASES[name][0]())
    _, _, params, table = converted(hf)
    state = state_of(hf)
    found = table.save(params)
    assert found.keys() == state.keys()
    for key, leaf in state.items():
        np.testing.assert_array_equal(found[key], leaf, err_msg=key)


UNREADABLE = {
    "frobnicate": (clip, {"frobnicate": 1}, {}),
    r"text_config.*frobnicate": (clip, {}, {"text_config": {"frobnicate": 1}}),
    "hidden_act is 'relu'": (clip, {}, {"text_config": {"hidden_act": "relu"}}),
    "num_channels is 4": (siglip, {}, {"vision_config": {"num_channels": 4}}),
    "vision_use_head": (siglip, {}, {"vision_config": {"vision_use_head": False}}),
    "NaFlex": (siglip, {"model_type": "siglip2"}, {}),
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_unknown_and_unsupported_fields_raise(message):
    make, top, parts = UNREADABLE[message]
    known = make().config.to_dict()
    changed = {**known, **top} | {name: {**known[name], **part} for name, part in parts.items()}
    with pytest.raises(UsageError, match=message):
        registry.read_hf(Fields("config", changed))


def test_an_old_file_says_its_sizes_twice():
    """laion's files have `text_config_dict`, which the original prefers to `text_config`."""
    written = {
        "model_type": "clip",
        "projection_dim": 1024,
        "text_config": {"hidden_size": 8, "eos_token_id": 2},
        "text_config_dict": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "hidden_act": "gelu",
        },
        "vision_config": {"model_type": "clip_vision_model"},
        "vision_config_dict": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
    }
    theirs = transformers.CLIPConfig(**written)
    ours = registry.read_hf(Fields("clip", written))
    assert ours == registry.read_hf(Fields("clip", theirs.to_dict()))
    assert ours == registry.config("clip_vit_h14")


# Parameters as transformers counts them, and for SigLIP also keras-hub's preset files less their
# tables of place numbers (which are no parameters).
COUNTS = {
    "clip_vit_b32": 151_277_313,
    "clip_vit_b16": 149_620_737,
    "clip_vit_l14": 427_616_513,
    "clip_vit_l14_336": 427_944_193,
    "clip_vit_h14": 986_109_441,
    "siglip_base_patch16_224": 203_155_970,
    "siglip_large_patch16_256": 652_150_786,
    "siglip_so400m_patch14_224": 877_360_306,
    "siglip_so400m_patch14_384": 877_960_498,
    "siglip2_giant_patch16_256": 1_871_393_906,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    assert size_by_part(shapes(registry.config(name)))["total"] == COUNTS[name]


def theirs_of(config):
    """The class of theirs and its configuration, for a configuration of ours."""
    v, t = config.vision, config.text
    common = {
        part: {
            "hidden_size": c.width,
            "intermediate_size": c.mlp_dim,
            "num_hidden_layers": c.depth,
            "num_attention_heads": c.num_heads,
        }
        for part, c in (("vision", v), ("text", t))
    }
    vision = {**common["vision"], "image_size": v.image_size, "patch_size": v.patch_size}
    text = {
        **common["text"],
        "vocab_size": t.vocab_size,
        "max_position_embeddings": t.max_length,
    }
    if config.pairing == "sigmoid":
        text["projection_size"] = config.embedding_dim
        whole = transformers.SiglipConfig(text_config=text, vision_config=vision)
        make = transformers.SiglipModel
    else:
        for part in (vision, text):
            part["hidden_act"] = v.activation
        text["eos_token_id"] = 2 if t.pool == "highest" else t.end_id
        whole = transformers.CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=config.embedding_dim
        )
        make = transformers.CLIPModel
    return make, whole


def test_every_variant_has_the_tensors_of_theirs():
    """The same keys and shapes, with one layer in each tower, and two at full depth; and the
    configuration is what the reader makes of theirs.
    """
    done = set()
    for slug in ("clip", "siglip"):
        for name, full in registry.base(slug).variants.items():
            config = full if name in ("clip_vit_l14", "siglip_so400m_patch14_384") else thin(full)
            make, written = theirs_of(config)
            assert registry.read_hf(Fields(name, written.to_dict())) == config, name
            if (like := anysize(config)) in done:
                continue
            done.add(like)
            with torch.device("meta"):
                hf = make(written)
            want = {key: tuple(leaf.shape) for key, leaf in hf.state_dict().items()}
            assert registry.base(slug).table(config).shapes(shapes(config)) == want, name


def anysize(config):
    """The configuration for images of one size."""
    size = 16 * config.vision.patch_size
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=size))


def thin(config):
    """The configuration with one layer in each tower."""
    vision, text = (dataclasses.replace(part, depth=1) for part in (config.vision, config.text))
    return dataclasses.replace(config, vision=vision, text=text)


class Words:
    """A processor whose pictures are arrays and whose tokens are words."""

    def __init__(self, is_masked):
        self.is_masked = is_masked

    def encode(self, images=None, texts=None):
        if images is not None:
            return {"pixels": np.stack(images)}
        ids = np.ones((len(texts), 12), np.int32)
        for row, text in zip(ids, texts, strict=True):
            words = [2 + zlib.crc32(word.encode()) % 60 for word in text.split()] + [63]
            row[: len(words)] = words
        return {"ids": ids, "text_mask": ids != 1} if self.is_masked else {"ids": ids}


@dataclasses.dataclass
class Ready:
    """What `zoo.load` returns, as far as it matters here."""

    config: object
    model: object
    variables: object
    processor: object


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_zero_shot_classes_by_their_names(name):
    make, is_masked = CASES[name]
    hf = redraw(make())
    config, model, params, _ = converted(hf)
    ready = Ready(config, model, {"params": params}, Words(is_masked))
    names = ["cat", "old dog", "bird"]
    templates = ("a photo of a {}.", "{} in the rain")
    pixels = images(5)
    ours = classify(ready, list(pixels), names, templates=templates, batch_size=4)

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    texts = [template.format(name) for name in names for template in templates]
    batch = ready.processor.encode(texts=texts)
    with torch.no_grad():
        out = asked(hf, pixels, batch["ids"], batch.get("text_mask"))
        head = unit(out.text_embeds.reshape(3, 2, -1).mean(1))
        logits = hf.logit_scale.exp() * out.image_embeds @ head.T
        is_single = config.pairing == "sigmoid"
        theirs = torch.sigmoid(logits + hf.logit_bias) if is_single else logits.softmax(-1)
    close(ours, theirs)
    head = class_head(ready, names, templates=templates, batch_size=4)
    close(judge(ready, list(pixels[:3]), head, batch_size=4), theirs[:3])
    with pytest.raises(UsageError, match="in the place of the name"):
        classify(ready, list(pixels), names, templates=["a photo"])
    with pytest.raises(UsageError, match="names: got 'cat'"):
        classify(ready, list(pixels), "cat")
    with pytest.raises(UsageError, match="want CLIP or SigLIP"):
        classify(dataclasses.replace(ready, config=config.text), list(pixels), names)


def test_errors_name_what_is_wrong():
    config = registry.config("clip_tiny")
    model, params = config.build(), draw(shapes(config))
    with pytest.raises(ValueError, match="at most 12"):
        model.apply({"params": params}, np.zeros((1, 13), np.int32), method="encode_text")
    with pytest.raises(ValueError, match="mask"):
        model.apply(
            {"params": params}, np.zeros((1, 4), np.int32), np.ones((1, 5)), method="encode_text"
        )
    with pytest.raises(ValueError, match="width = 32"):
        type(config)(vision=config.vision, project_image=False, embedding_dim=20)
