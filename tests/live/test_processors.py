"""Pixels, grids, ids and chats equal those of transformers, whose Pillow processors count."""

import numpy as np
import pytest
from PIL import Image

from tests.live import tiny_processors as tiny
from tests.live.reference import transformers
from zoo.images import read_image
from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.text.clip import TextConfig
from zoo.models.parts.towers.vit import ViTConfig
from zoo.processors.hf import load_processor
from zoo.processors.hub_text import HubTokenizer
from zoo.processors.image_config import views_of
from zoo.processors.native import NativeSpec
from zoo.processors.views import Native

SIZES = [(333, 517), (61, 48), (1, 7), (50, 2000), (224, 224), (337, 673)]


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, texture and hard edges, which is what resampling is judged by."""
    rng = np.random.default_rng([seed, height, width])
    coarse = rng.integers(0, 256, (1 + height // 16, 1 + width // 16, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    picture = np.asarray(smooth).astype(int) + rng.normal(0, 12, (height, width, 3)).astype(int)
    picture[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return picture.clip(0, 255).astype(np.uint8)


def odd_pictures() -> list[Image.Image]:
    """Palettes, transparency and grey."""
    plain = Image.fromarray(photograph(45, 70))
    clear = plain.copy()
    clear.putalpha(Image.fromarray(photograph(45, 70, 1)[..., 0]))
    palette = plain.quantize(16)
    marked = palette.copy()
    marked.info["transparency"] = 3
    return [palette, marked, clear, plain.convert("L"), clear.convert("LA"), plain.convert("1")]


CASES = {
    "clip": ("CLIPImageProcessorPil", {"crop_size": 56, "size": 64}),
    "clip_small": ("CLIPImageProcessorPil", {"crop_size": {"height": 65, "width": 40}, "size": 48}),
    "siglip": ("SiglipImageProcessorPil", {"size": {"height": 64, "width": 48}, "resample": 1}),
    "vit": ("ViTImageProcessorPil", {"size": 64}),
    "vit_raw": ("ViTImageProcessorPil", {"size": 64, "do_rescale": False, "resample": 0}),
    "mae": ("ViTImageProcessorPil", {"image_mean": [0.485, 0.456, 0.406], "do_normalize": True}),
    "dinov2": ("BitImageProcessorPil", {"size": {"shortest_edge": 80}, "resample": 3}),
    "llava": ("LlavaImageProcessorPil", {"size": 56, "crop_size": 56, "do_pad": True}),
    "llava_next": (
        "LlavaNextImageProcessorPil",
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
        },
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessorPil",
        {
            "size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28 * h, 28 * w] for h in (1, 2, 3) for w in (1, 2, 3, 6)],
        },
    ),
    "internvl": (
        "GotOcr2ImageProcessorPil",
        {"size": {"height": 28, "width": 28}, "max_patches": 6, "image_std": [0.2, 0.3, 0.4]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_transformers(case):
    name, settings = CASES[case]
    theirs = getattr(transformers, name)(**settings)
    views = views_of(theirs.to_dict())
    assert views == views_of({"image_processor_type": name, **settings})
    extra = {"crop_to_patches": True} if case == "internvl" else {}
    pictures = [photograph(*size) for size in SIZES]
    pictures += [] if name.startswith("ViT") else odd_pictures()  # which that class keeps grey
    for picture in pictures:
        given = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        expected = theirs(given, **extra)["pixel_values"]
        expected = np.asarray(expected[0] if "llava_" in case else expected)  # [M, 3, h, w]
        ours = views.tiles(read_image(given))
        assert ours.dtype == np.float32
        assert np.array_equal(ours, expected.transpose(0, 2, 3, 1))


def test_each_of_several_pictures_is_one_tile_for_onevision():
    name, settings = CASES["llava_onevision"]
    theirs = getattr(transformers, name)(**settings)
    views = views_of(theirs.to_dict())
    pictures = [photograph(*size) for size in SIZES[:3]]
    expected = theirs([list(map(Image.fromarray, pictures))])["pixel_values"]
    for picture, pixels in zip(pictures, expected, strict=True):
        ours = views.tiles(picture, alone=False)
        assert np.array_equal(ours, np.asarray(pixels).transpose(0, 2, 3, 1))


@pytest.mark.parametrize("settings", [{}, {"min_pixels": 28 * 56, "max_pixels": 56 * 84}])
def test_patches_and_grids_are_those_of_qwen(settings):
    theirs = transformers.Qwen2VLImageProcessorPil(**settings)
    views = views_of(theirs.to_dict())
    assert isinstance(views, Native)
    for size in (*SIZES, (20, 3000)):
        picture = photograph(*size)
        expected = theirs(Image.fromarray(picture))
        ours = views.picture(picture, NativeSpec())
        assert [list(ours.grid)] == np.asarray(expected["image_grid_thw"]).tolist()
        assert np.array_equal(ours.patches, np.asarray(expected["pixel_values"]))


# Text.


@pytest.mark.parametrize(
    "settings",
    [{}, {"legacy": True}, {"add_bos_token": True, "add_eos_token": True}, {"legacy": False}],
)
def test_llama_vocabularies_give_the_ids_of_transformers(tmp_path, settings):
    tiny.write_llama(tmp_path / "spm", **settings)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path / "spm")
    same_ids(HubTokenizer.load(tmp_path / "spm"), theirs)
    theirs.save_pretrained(tmp_path / "json")
    tiny.write_json(tmp_path / "json" / "config.json", model_type="llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "json")
    same_ids(HubTokenizer.load(tmp_path / "json"), theirs)


@pytest.mark.parametrize("architecture", ["llava", "llama", "mistral"])
def test_older_llama_files_count_as_they_do_in_transformers(tmp_path, architecture):
    """They set a space before every part; what `LlamaTokenizer` builds does so once."""
    tiny.write_older_llama(tmp_path, architecture)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = HubTokenizer.load(tmp_path)
    same_ids(ours, theirs, "USER: <image>\nwhat is it? ASSISTANT:", "<image> a", "<s>a</s>b")
    assert (ours.bos, ours.eos, ours.pad) == (1, 2, theirs.pad_token_id)
    ours.save(tmp_path / "..")
    again = HubTokenizer.load(tmp_path / "..")
    assert again.names == ours.names
    assert again.encode("<image> a", control=True) == ours.encode("<image> a", control=True)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
def test_siglip_gives_the_ids_of_transformers(tmp_path, rule):
    tiny.write_siglip(tmp_path, rule)
    theirs = transformers.SiglipTokenizer.from_pretrained(tmp_path)
    ours = HubTokenizer.load(tmp_path)
    for text in tiny.STRANGE:
        if "</s>" not in text:  # a control token for theirs
            assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.max_length == 64


@pytest.mark.parametrize(
    "make", [tiny.write_qwen, tiny.write_opt, tiny.write_clip, tiny.write_bert]
)
def test_other_families_give_the_ids_of_transformers(tmp_path, make):
    make(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = HubTokenizer.load(tmp_path)
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.bos, ours.eos, ours.pad) == ids
    same_ids(ours, theirs, "<|im_start|>user\nhi<|image_pad|><|im_end|>", "A Cat's photo")


def same_ids(ours: HubTokenizer, theirs, *more: str) -> None:
    for text in (*tiny.STRANGE, *more):
        for around in (True, False):
            expected = theirs(text, add_special_tokens=around)["input_ids"]
            assert ours.encode(text, control=True, around=around) == expected, text
    sentence = theirs(tiny.TEXTS[0])["input_ids"]
    if "CLIP" not in type(theirs).__name__:  # which decodes nothing
        assert ours.decode(sentence) == theirs.decode(sentence, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_pictures_and_texts_of_dual_encoders(tmp_path, family):
    write = {"clip": tiny.write_clip, "siglip": tiny.write_siglip}[family]
    write(tmp_path)
    name, settings = CASES[family]
    settings = {**settings, "size": {"height": 56, "width": 56}}
    images = getattr(transformers, name)(**settings)
    images.save_pretrained(tmp_path)
    tokenizer = getattr(transformers, name.replace("ImageProcessorPil", "Tokenizer"))
    theirs = getattr(transformers, name.replace("ImageProcessorPil", "Processor"))(
        images, tokenizer.from_pretrained(tmp_path)
    )
    pictures = [photograph(*size) for size in SIZES[:2]]
    texts = ["a cat", "a photo of two dogs"]
    fixed = family == "siglip"
    expected = theirs(
        images=list(map(Image.fromarray, pictures)),
        text=texts,
        padding="max_length",
        max_length=64,
    )
    text = TextConfig(max_length=64, pool="last" if fixed else "end")
    tower = ViTConfig(image_size=56, patch_size=14, width=8, depth=1, num_heads=2, mlp_dim=8)
    ours = load_processor(tmp_path, DualConfig(tower, text)).encode(pictures, texts)
    pixels = np.asarray(expected["pixel_values"]).transpose(0, 2, 3, 1)
    assert np.array_equal(ours["pixels"], pixels)
    ids = np.asarray(expected["input_ids"])
    assert np.array_equal(ours["ids"], ids[:, : ours["ids"].shape[1]])
    if fixed:
        assert "text_mask" not in ours
    else:
        assert ours["text_mask"].sum() == np.asarray(expected["attention_mask"]).sum()


# Prompts with pictures.


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompts_become_what_transformers_makes_of_them(tmp_path, family):
    theirs, config = tiny.FAMILIES[family](tmp_path)
    ours = load_processor(tmp_path, config)
    pictures = [photograph(*size) for size in SIZES[:3]]
    image = theirs.image_token
    conversations = [
        [turn("user", pictures[:1], "What is in the picture?")],
        [
            turn("user", pictures[1:], "What differs?"),
            turn("assistant", [], "The left one is larger."),
            turn("user", [], "And  <here>?\n"),
        ],
        [{"role": "system", "content": [text_part("Be brief.")]}, turn("user", [], "Hello")],
    ]
    shown = [pictures[:1], pictures[1:], []]
    for messages, given in zip(conversations, shown, strict=True):
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert ours.template.render(messages) == rendered
        ids = their_ids(theirs, messages, given)
        assert ours.expanded_ids(given, messages) == [ids]
        assert rendered.count(image) == len(given)
        if rendered.startswith(str(theirs.tokenizer.bos_token)):
            continue  # transformers would put a second one before it
        raw = theirs(text=rendered, images=[list(map(Image.fromarray, given))] if given else None)
        assert ours.expanded_ids(given, rendered, raw=True) == np.asarray(raw["input_ids"]).tolist()
    single = ours.expanded_ids(shown[0], "What is in the picture?")
    assert single == ours.expanded_ids(shown[0], conversations[0])

    batch = ours.encode_prompt(shown, conversations)
    expected = ours.expanded_ids(shown, conversations)
    assert [len(row) for row in expanded(batch, ours.vision)] == list(map(len, expected))
    assert expanded(batch, ours.vision) == expected
    check_pixels(batch, theirs, shown)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_control_tokens_in_a_question_are_spelled_out(tmp_path, family):
    theirs, config = tiny.FAMILIES[family](tmp_path)
    ours = load_processor(tmp_path, config)
    picture, image = photograph(*SIZES[0]), theirs.image_token
    stop = theirs.tokenizer.eos_token
    messages = [turn("user", [picture], f"say{image} and{stop}<|im_start|> {image}")]
    expected = their_ids(theirs, messages, [picture], sanitize_control_tokens=True)
    assert ours.expanded_ids(picture, messages) == [expected]
    assert ours.encode_prompt(picture, messages)["ids"].tolist()[0].count(config.image_id) == 1


def turn(role: str, pictures, text: str) -> dict:
    return {"role": role, "content": [{"type": "image"}] * len(pictures) + [text_part(text)]}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def their_ids(theirs, messages, pictures, **options) -> list[int]:
    """Ids of a conversation."""
    given = [Image.fromarray(picture) for picture in pictures]
    found = theirs.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": given} if given else {},
        **options,
    )
    return np.asarray(found["input_ids"]).reshape(-1).tolist()


def expanded(batch, vision) -> list[list[int]]:
    """The ids of every row of a batch, the placeholders as often as there are vision tokens."""
    rows = []
    for b, (ids, mask) in enumerate(zip(batch["ids"], batch["text_mask"], strict=True)):
        count, row = 0, []
        for token in ids[mask].tolist():
            times = 1
            if token == vision.image_id:
                times = batch["sizes"][b, count] if "sizes" in batch else vision.tokens
                count += 1
            row += [token] * int(times)
        rows.append(row)
        unused = ids[~mask].tolist().count(vision.image_id)
        assert unused + count == (ids == vision.image_id).sum()
    placeholders = (batch["ids"] == vision.image_id).sum(1)
    assert len(set(placeholders.tolist())) == 1
    return rows


def check_pixels(batch, theirs, shown) -> None:
    """Every row has the pixels that transformers makes of its pictures, then zeros."""
    name = "patches" if "patches" in batch else "pixels"
    for row, pictures in zip(batch[name], shown, strict=True):
        parts = np.zeros((0, *row.shape[1:]), np.float32)
        if pictures:
            prompt = theirs.image_token * len(pictures)
            found = theirs(text=[prompt], images=[list(map(Image.fromarray, pictures))])
            parts = found["pixel_values"]
            if "image_sizes" in found:  # with empty tiles behind those of smaller pictures
                parts = [p for image in parts for p in np.asarray(image) if np.any(p)]
            parts = np.asarray(parts)
            parts = parts if name == "patches" else parts.transpose(0, 2, 3, 1)
        assert np.array_equal(row[: len(parts)], parts)
        assert not row[len(parts) :].any()
