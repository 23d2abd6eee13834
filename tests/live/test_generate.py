"""Generation against transformers: the same tokens, and the same distributions to draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.live import test_decoders as decoders
from tests.live import test_llava_family as family
from tests.live import test_qwen_vl as qwen
from tests.live.reference import torch, transformers
from zoo.generate.autoregressive import generate
from zoo.generate.sampling import Sampling, penalize, warp

STEPS = 8
WARPERS = transformers.generation.logits_process


def continued(hf, inputs, **options):
    """The new tokens that transformers writes, greedily."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    hf.generation_config = transformers.GenerationConfig(max_new_tokens=STEPS, **options)
    return hf.generate(**inputs)[:, inputs["input_ids"].shape[1] :].numpy()


def ours(config, params, batch, sampling=None, eos_id=()):
    options = {"max_new_tokens": STEPS, "eos_id": eos_id, "sampling": sampling}
    return generate(config.build(), params, batch, **options)


def left_padded(rows):
    """Ids and attention mask of rows of different lengths."""
    length = max(map(len, rows))
    ids = [[0] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


# ------------------------------------------------------------------ text


def prompts(lengths):
    """Random rows, and the same as a batch padded on the right."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, decoders.VOCAB, n).tolist() for n in lengths]
    ids = np.zeros((len(rows), max(lengths)), np.int32)
    for row, ours in zip(rows, ids, strict=True):
        ours[: len(row)] = row
    return rows, {"ids": ids, "text_mask": np.arange(max(lengths)) < np.array(lengths)[:, None]}


@pytest.mark.parametrize("name", ["llama gqa, biases, wide heads", "qwen3", "gemma2", "opt"])
def test_text(name):
    hf, config = decoders.original(name)
    _, _, params = decoders.converted(hf, config)
    rows, batch = prompts((11, 4, 7))
    found = ours(config, params, batch)
    assert found.tolist() == continued(hf, left_padded(rows)).tolist()
    assert len(np.unique(found)) > 5


def test_text_alone_with_a_penalty_and_ends():
    hf, config = decoders.original("llama mha")
    _, _, params = decoders.converted(hf, config)
    [row], batch = prompts((9,))
    inputs, penalty = left_padded([row]), {"repetition_penalty": 1.3}
    plain = continued(hf, inputs)
    assert ours(config, params, batch).tolist() == plain.tolist()
    penalized = continued(hf, inputs, **penalty)
    assert ours(config, params, batch, Sampling(**penalty)).tolist() == penalized.tolist()
    assert (penalized != plain).any()
    ends = [60, int(plain[0, 3])]
    theirs = continued(hf, inputs, eos_token_id=ends)
    found = ours(config, params, batch, eos_id=ends)
    assert found[0, : theirs.shape[1]].tolist() == theirs[0].tolist()
    assert (found[0, theirs.shape[1] :] == 60).all()


# ------------------------------------------------------------------ with pictures


def inputs_of(hf, rows):
    """Rows of ids and pictures as transformers takes them."""
    shown = [[item for item in row if isinstance(item, family.Picture)] for row in rows]
    ids = [
        [
            i
            for item in row
            for i in (
                [family.VIDEO if item.video else family.IMAGE] * item.reading.size
                if isinstance(item, family.Picture)
                else [item]
            )
        ]
        for row in rows
    ]
    inputs = left_padded(ids)
    images = [p for row in shown for p in row if not p.video]
    tiles = [torch.tensor(image.tiles.transpose(0, 3, 1, 2)) for image in images]
    if images and hf.config.model_type in ("llava", "internvl"):
        inputs["pixel_values"] = torch.cat(tiles)
    elif images:
        most = max(map(len, tiles))
        pad = [torch.nn.functional.pad(x, (0, 0) * 3 + (0, most - len(x))) for x in tiles]
        inputs["pixel_values"] = torch.stack(pad)
        inputs["image_sizes"] = torch.tensor([image.size for image in images])
    if images and hf.config.model_type == "llava_onevision":
        counts = [sum(not p.video for p in row) for row in shown]
        inputs["batch_num_images"] = torch.tensor(counts)
    for video in (p for row in shown for p in row if p.video):
        inputs["pixel_values_videos"] = torch.tensor(video.tiles.transpose(0, 3, 1, 2))[None]
    return inputs


@pytest.mark.parametrize("name", ["llava", "next", "onevision", "internvl"])
def test_llava_family(name):
    hf, config, params = family.converted(name)
    assembly = family.ASSEMBLIES[name]
    together = ours(config, params, family.ours(assembly))
    assert together.tolist() == continued(hf, inputs_of(hf, assembly.rows)).tolist()
    first = family.dataclasses.replace(assembly, rows=assembly.rows[:1])
    alone = ours(config, params, family.ours(first))
    assert alone.tolist() == continued(hf, inputs_of(hf, first.rows)).tolist()
    assert len(np.unique(together)) > 5


@pytest.mark.parametrize("kind", qwen.KINDS)
def test_qwen_vl(kind):
    pair = qwen.pair(kind)
    ids, pictures = qwen.prompts(pair.spec)
    for rows in ([0, 1, 2, 3], [2], [1]):
        prompt = [ids[row] for row in rows], [pictures[row] for row in rows]
        found = ours(pair.config, pair.params, qwen.ours(pair.spec, *prompt))
        theirs = continued(pair.hf, qwen.theirs(pair.spec, *prompt, kind, left=True))
        assert found.tolist() == theirs.tolist()


# ------------------------------------------------------------------ what is drawn from


@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 20, 5000])
def test_the_distribution_is_theirs(top_k, top_p):
    """To the last bit. Of equal logits, of which those in bfloat16 are full, as many stay as there;
    which of them do is up to torch's sort, which is not stable."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(8, 1000)) * 4).astype(np.float32)
    logits[4:] = logits[4:].astype(jnp.bfloat16)
    logits[7] = 0.25
    ids = rng.integers(0, 1000, (8, 50))
    temperature, penalty = 0.7, 1.3
    theirs = [WARPERS.RepetitionPenaltyLogitsProcessor(penalty)]
    theirs.append(WARPERS.TemperatureLogitsWarper(temperature))
    if top_k:
        theirs.append(WARPERS.TopKLogitsWarper(top_k))
    if top_p < 1:
        theirs.append(WARPERS.TopPLogitsWarper(top_p))
    processed = WARPERS.LogitsProcessorList(theirs)(torch.tensor(ids), torch.tensor(logits))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, 1)
    knobs = Sampling(temperature, top_k, top_p, penalty).knobs(8)
    found, expected = np.asarray(distribution(logits, seen, knobs)), processed.numpy()
    np.testing.assert_array_equal(found[:4], expected[:4])
    np.testing.assert_array_equal(np.sort(found), np.sort(expected))


@jax.jit
def distribution(logits, seen, knobs):
    return warp(penalize(logits, seen, knobs.penalty), knobs)
