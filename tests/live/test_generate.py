"""Generation against transformers: the same tokens, and the same distributions to draw from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.live import test_decoders as decoders
from tests.live import test_llava_family as family
from tests.live import test_qwen_vl as qwen
from tests.live import tiny_processors as tiny
from tests.live.reference import redraw, torch, transformers
from tests.live.test_processors import photograph
from zoo.cli import main
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
    for rows in ([0, 1, 2, 3], [2]):
        prompt = [ids[row] for row in rows], [pictures[row] for row in rows]
        found = ours(pair.config, pair.params, qwen.ours(pair.spec, *prompt))
        theirs = continued(pair.hf, qwen.theirs(pair.spec, *prompt, kind, left=True))
        assert found.tolist() == theirs.tolist()


# ------------------------------------------------------------------ from files to text

BROKEN = "\N{REPLACEMENT CHARACTER}"


def saved(kind, folder):
    """A tiny checkpoint in `folder`, with its processor and model."""
    processor, _ = getattr(tiny, kind)(folder)
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 256}
    if kind == "llava":
        vision = {**family.CLIP, "image_size": 28, "patch_size": 14}
        config = transformers.LlavaConfig(
            vision_config=vision,
            text_config={**family.LLAMA, **text},
            image_token_index=processor.image_token_id,
        )
        hf = redraw(transformers.LlavaForConditionalGeneration(config))
    else:
        ids = {"image_token_id": processor.image_token_id}
        ids["video_token_id"] = processor.video_token_id
        config = transformers.Qwen2VLConfig(
            text_config={**qwen.TEXT, **text, "rope_scaling": qwen.scaling("qwen2_vl")},
            vision_config={**qwen.VISION["qwen2_vl"], "patch_size": 14},
            tie_word_embeddings=False,
            **ids,
        )
        hf = redraw(transformers.Qwen2VLForConditionalGeneration(config))
    hf.generation_config = transformers.GenerationConfig(eos_token_id=[2, 300], pad_token_id=0)
    hf.save_pretrained(folder)
    return processor, hf


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_the_command_answers_as_transformers_does(kind, tmp_path, capsys):
    processor, hf = saved(kind, tmp_path / "model")
    capsys.readouterr()
    files = [tmp_path / f"{name}.png" for name in ("first", "second")]
    pictures = [Image.fromarray(photograph(40 + 9 * i, 60 - 5 * i)) for i in range(2)]
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    told, question = "Be brief.", "What differs?"
    parts = [{"type": "image", "image": picture} for picture in pictures]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": told}]},
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    options = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 2.0}
    new = hf.generate(**inputs, **options)
    new = new[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(new, skip_special_tokens=True).rstrip(BROKEN).strip()
    assert len(expected) > 5, new

    images = [flag for file in files for flag in ("--image", str(file))]
    command = ["generate", str(tmp_path / "model"), *images, "--system", told]
    command += ["--prompt", question, "--max-new-tokens", "12", "--repetition-penalty", "2"]
    answers = []
    for flags in ([], ["--stream"], ["--json"]):
        assert main([*command, *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert json.loads(answers[2])["answer"] == answers[0][:-1]
    # Both end in the middle of a character, which we leave out.
    assert answers[0].startswith(expected)
    assert len(answers[0].strip()) <= len(expected) + 3

    for flags, message in (
        (["--max-new-tokens", "250"], "the context of the model is 256 tokens"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "word " * 300], "the model takes 256"),
        (["--image", str(tmp_path / "third.png")], "does not exist"),
    ):
        assert main([*command, *flags]) in (1, 2)
        assert message in capsys.readouterr().err


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
