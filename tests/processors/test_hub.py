"""Processors of published checkpoints: what they refuse and what they keep, without PyTorch."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from zoo.models.core.errors import UsageError, ZooError
from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.assemblies.language import CausalLMConfig
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.text.clip import TextConfig
from zoo.models.parts.towers.vit import ViTConfig
from zoo.processors import sentencepiece
from zoo.processors.hf import load_processor
from zoo.processors.hub_text import HubTokenizer
from zoo.processors.image_config import read_views, views_of
from zoo.processors.pixels import Exactly, Pipeline, ShortestEdge, center_crop
from zoo.processors.template import ChatTemplate, find_template

SPECIAL = ["<s>", "</s>", "<pad>", "<image>", "<turn>"]
TEMPLATE = """{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}:
{%- if m.content is string %} {{ m.content }}{% else %}{% for part in m.content %}
{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}{% endif %}
{% endfor %}{% if add_generation_prompt %}<turn>model:{% endif %}"""

TOWER = ViTConfig(image_size=28, patch_size=14, width=8, depth=2, num_heads=2, mlp_dim=8)
DECODER = DecoderConfig(
    vocab_size=300, width=8, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=8, context=64
)
LLAVA = LlavaConfig(TOWER, decoder=DECODER, image_id=259)
PICTURE = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)


def write(file: Path, values) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")


def write_tokenizer(folder: Path, **settings) -> None:
    """Bytes as tokens, with `<s>` before a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(SPECIAL)
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write(folder / "tokenizer_config.json", {**named, "image_token": "<image>", **settings})


def write_checkpoint(folder: Path, *, template: str | None = TEMPLATE, **image) -> Path:
    write_tokenizer(folder)
    image = {"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 28} | image
    write(folder / "preprocessor_config.json", image)
    if template is not None:
        write(folder / "chat_template.jinja", template)
    return folder


@pytest.fixture
def processor(tmp_path):
    return load_processor(write_checkpoint(tmp_path / "llava"), LLAVA)


# Prompts.


def test_a_question_gets_its_pictures_and_the_turn_of_the_model(processor):
    batch = processor.encode_prompt(PICTURE, "what?")
    assert set(batch) == {"pixels", "ids", "text_mask"}
    assert batch["pixels"].shape == (1, 1, 28, 28, 3)
    assert batch["ids"].shape == batch["text_mask"].shape
    text = processor.tokenizer._fast.decode(batch["ids"][batch["text_mask"]], False)
    assert text == "<s><turn>user:<image> what?<turn>model:"
    (ids,) = processor.expanded_ids([PICTURE], "what?")
    assert ids.count(259) == 4
    told = processor.expanded_ids(None, "what?", system="be brief")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}]
    assert told == processor.expanded_ids(None, turns)
    both = processor.encode_prompt([[PICTURE, PICTURE], None], ["what?", "and?"])
    assert both["pixels"].shape == (2, 2, 28, 28, 3)
    assert not both["pixels"][1].any()
    assert (both["ids"] == 259).sum(1).tolist() == [2, 2]
    assert (both["ids"] == 259)[both["text_mask"]].sum() == 2


def test_a_batch_of_text_alone_has_no_pixels(processor):
    assert set(processor.encode_prompt(None, "what?")) == {"ids", "text_mask"}
    assert set(processor.encode_prompt(None, ["what?", "and?"])) == {"ids", "text_mask"}


def test_control_tokens_count_only_where_the_template_or_a_raw_prompt_has_them(processor):
    question = "a </s> b <image><turn>"
    (ids,) = processor.expanded_ids(PICTURE, question)
    assert ids.count(259) == 4
    assert ids.count(processor.tokenizer.eos) == 0
    assert ids.count(processor.tokenizer.id("<turn>")) == 2
    assert question in processor.tokenizer.decode(ids)
    with pytest.raises(UsageError, match="2 placeholders <image> for 1 pictures"):
        processor.expanded_ids(PICTURE, f"<image>{question}", raw=True)


@pytest.mark.parametrize(
    ("images", "prompts", "raw", "message"),
    [
        (None, "  ", False, "prompt is empty"),
        (None, "", True, "prompt is empty"),
        (None, [], False, "no prompts"),
        ([None], ["a", "b"], False, "pictures for 1 prompts and 2 prompts"),
        (PICTURE, ["a", "b"], False, "pictures for 1 prompts and 2 prompts"),
        (None, "<image> what?", True, "1 placeholders <image> for 0 pictures"),
        ([PICTURE] * 2, "<image> what?", True, "1 placeholders <image> for 2 pictures"),
        (PICTURE, [{"role": "user", "content": "hello"}], False, "0 placeholders"),
        (None, [{"content": "hello"}], False, "with `role`"),
        (None, [{"role": "user", "content": "hello"}], True, "raw prompt is a conversation"),
        ([None, None], ["fine", " "], False, "prompt 2: the prompt is empty"),
    ],
)
def test_wrong_prompts_are_refused(processor, images, prompts, raw, message):
    with pytest.raises(UsageError, match=message):
        processor.encode_prompt(images, prompts, raw=raw)


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(processor):
    (short,) = processor.expanded_ids(PICTURE, "x")
    longest = "x" * (65 - len(short))
    assert len(processor.expanded_ids(PICTURE, longest)[0]) == 64
    with pytest.raises(ZooError, match="has 65 tokens with its pictures and the model takes 64"):
        processor.encode_prompt(PICTURE, longest + "x")


def test_a_bad_picture_is_refused_by_name(processor, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    Image.fromarray(PICTURE).save(tmp_path / "good.png")
    shown = [tmp_path / "good.png", tmp_path / "bad.jpg"]
    with pytest.raises(ZooError, match=r"prompt 2: .*bad\.jpg"):
        processor.encode_prompt(shown, ["what?", "what?"])
    with pytest.raises(ZooError, match=r"gone\.png does not exist"):
        processor.encode_prompt("gone.png", "what?")


def test_answers_end_at_a_stop_token_and_have_no_special_ones(processor):
    tokenizer = processor.tokenizer
    ids = [*tokenizer.encode(" a boat", around=False), tokenizer.id("<turn>"), tokenizer.eos, 70]
    assert processor.decode(np.array(ids)) == " a boat"
    assert processor.stop_ids == (tokenizer.eos,)
    write(processor.folder / "generation_config.json", {"eos_token_id": [260, 257]})
    stopping = load_processor(processor.folder, LLAVA)
    assert stopping.stop_ids == (260, 257)
    assert stopping.decode(ids) == " a boat"


def test_few_shapes_occur(processor):
    shapes = {processor.encode_prompt(None, "x" * length)["ids"].shape for length in range(1, 44)}
    assert len(shapes) <= 9


def test_a_saved_processor_does_the_same(processor, tmp_path):
    processor.save(tmp_path / "again")
    again = load_processor(tmp_path / "again", LLAVA)
    assert again.stop_ids == processor.stop_ids
    expected = processor.encode_prompt(PICTURE, "what is </s>?")
    found = again.encode_prompt(PICTURE, "what is </s>?")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_without_a_template_text_stands_for_itself(tmp_path):
    write_checkpoint(tmp_path, template=None)
    processor = load_processor(tmp_path, LLAVA)
    with pytest.raises(UsageError, match="no chat template"):
        processor.encode_prompt(PICTURE, "what?")
    with pytest.raises(UsageError, match="no chat template"):
        processor.encode_prompt(None, [{"role": "user", "content": "hello"}])
    assert processor.encode_prompt(PICTURE, "USER: <image> what?", raw=True)["pixels"].any()
    language = load_processor(tmp_path, CausalLMConfig(DECODER))
    ids = language.expanded_ids(None, "a</s>")[0]
    assert ids == language.tokenizer.encode("a</s>")
    assert language.tokenizer.eos not in ids
    with pytest.raises(UsageError, match="what `system` is for"):
        language.encode_prompt(None, "what?", system="be brief")
    with pytest.raises(UsageError, match="text alone"):
        language.encode_prompt(PICTURE, "what?")


def test_what_is_not_of_one_checkpoint_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, crop_size=42, size=42)
    with pytest.raises(ZooError, match="become 42 x 42 pixels and the model takes 28 x 28"):
        load_processor(folder, LLAVA)
    with pytest.raises(ZooError, match="a Single is made of a picture and the model has a newline"):
        load_processor(write_checkpoint(tmp_path / "next"), replace(LLAVA, newline=True))
    with pytest.raises(ZooError, match="makes a Single of a picture"):
        load_processor(folder, QwenVLConfig())
    write(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"})
    with pytest.raises(ZooError, match="makes a Native of a picture"):
        load_processor(folder, LLAVA)


# Encoders.


def test_texts_and_pictures_of_a_dual_encoder(tmp_path):
    write_checkpoint(tmp_path)
    text = TextConfig(max_length=32)
    processor = load_processor(tmp_path, DualConfig(TOWER, text))
    batch = processor.encode([PICTURE, PICTURE], ["a cat", "a photo of a dog", "<s>"])
    assert batch["pixels"].shape == (2, 28, 28, 3)
    assert batch["ids"].shape == (3, 20)
    assert batch["text_mask"].sum(1).tolist() == [6, 17, 4]
    fixed = load_processor(tmp_path, DualConfig(TOWER, TextConfig(max_length=32, pool="last")))
    batch = fixed.encode(texts="a cat")
    assert set(batch) == {"ids"}
    assert batch["ids"][0, 6:].tolist() == [258] * 26
    processor.save(tmp_path / "again")
    again = load_processor(tmp_path / "again", DualConfig(TOWER, text))
    assert np.array_equal(
        again.encode(texts="a cat")["ids"], processor.encode(texts="a cat")["ids"]
    )
    with pytest.raises(ZooError, match="a text has 41 tokens and the model takes 32"):
        processor.encode(texts="x" * 40)
    for wrong in ({}, {"texts": []}, {"images": []}, {"texts": [" "]}):
        with pytest.raises(ZooError):
            processor.encode(**wrong)


# Tokenizers.


def test_missing_and_damaged_tokenizers_are_refused(tmp_path):
    with pytest.raises(ZooError, match="has no tokenizer"):
        HubTokenizer.load(tmp_path)
    for content in ("", "{}", "no json", '{"version": "1.0"}'):
        write(tmp_path / "tokenizer.json", content)
        with pytest.raises(ZooError, match=r"tokenizer\.json"):
            HubTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"})
    write(tmp_path / "tokenizer.model", "")
    with pytest.raises(ZooError, match="a GemmaTokenizer is read from"):
        HubTokenizer.load(tmp_path)
    write(tmp_path / "tokenizer_config.json", "[]")
    with pytest.raises(ZooError, match=r"tokenizer_config\.json holds a list"):
        HubTokenizer.load(tmp_path)


def test_tokens_that_only_the_configuration_names_are_added(tmp_path):
    added = {"300": {"content": "<extra>", "special": True, "normalized": False}}
    write_tokenizer(tmp_path, added_tokens_decoder=added, extra_special_tokens=["<more>"])
    tokenizer = HubTokenizer.load(tmp_path)
    assert tokenizer.id("<extra>") == 261
    assert tokenizer.encode("<extra><more>", control=True, around=False) == [261, 262]
    assert len(tokenizer.encode("<extra>", around=False)) == 7
    write_tokenizer(tmp_path)
    write(tmp_path / "added_tokens.json", {"<late>": 262, "<early>": 261})
    older = HubTokenizer.load(tmp_path)
    assert (older.id("<early>"), older.id("<late>")) == (261, 262)
    assert older.decode([261, 256]) == "<early>"
    with pytest.raises(ZooError, match="no token '<none>'"):
        tokenizer.id("<none>")


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of Protocol Buffers."""

    def number(value: int) -> bytes:
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + number(rest) if rest else bytes([low])

    parts = []
    for field, value in fields:
        if isinstance(value, int):
            parts.append(number(field << 3) + number(value))
        else:
            parts.append(number(field << 3 | 2) + number(len(value)) + value)
    return b"".join(parts)


def vocabulary() -> bytes:
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
    kinds = [2, 3, 3, 1, 1, 1, 1, 1]
    listed = [
        (1, message((1, text.encode()), (3, k))) for text, k in zip(pieces, kinds, strict=True)
    ]
    return message(*listed, (2, message((3, 2), (40, 0), (43, (1 << 64) - 1))))


def test_a_small_vocabulary_is_read_and_used(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(vocabulary())
    found = sentencepiece.read_vocabulary(tmp_path / "tokenizer.model")
    assert found.merges() == [("a", "b"), ("▁", "ab")]
    fast = sentencepiece.llama_tokenizer(found, bos="<s>")
    assert fast.encode("ab ab<s>ab").ids == [1, 7, 7, 1, 6]
    assert fast.decode([1, 7, 7]) == "ab ab"


def test_damaged_vocabularies_never_escape_as_other_errors(tmp_path):
    file, whole = tmp_path / "tokenizer.model", vocabulary()
    rng = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in range(0, len(whole), 3)]
    for _ in range(60):
        broken = np.frombuffer(whole, np.uint8).copy()
        broken[rng.integers(len(broken), size=3)] = rng.integers(0, 256, 3)
        damaged.append(broken.tobytes())
    refused = 0
    for content in damaged:
        file.write_bytes(content)
        try:
            sentencepiece.read_vocabulary(file)
        except ZooError:
            refused += 1
    assert refused > len(damaged) // 3


# Chat templates.


def render(source: str, **more) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(
        [{"role": "user", "content": "hi", "extra": PICTURE, "none": None}], **more
    )


def test_templates_have_what_transformers_gives_them():
    assert render("{{ bos_token }}{{ messages[0].content }}") == "<s>hi"
    assert (
        render("{{ messages[0].content | tojson }}{{ {'a': '<é>'} | tojson }}")
        == '"hi"{"a": "<é>"}'
    )
    assert render("{% generation %}x{% endgeneration %}{% if tools %}y{% endif %}") == "x"
    assert render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
    assert render("{{ dict(a=1).a }}{{ tools }}", tools=[{"b": 2}]) == "1[{'b': 2}]"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{{ messages[0].extra }}{{ 'none' in messages[0] }}") == "<ndarray>False"
    assert render("{% if add_generation_prompt %}a{% endif %}", add_generation_prompt=False) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no pictures, please') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ dict.__call__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ messages[0].content.nothing.more }}",
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(source):
    with pytest.raises(ZooError, match="the chat template"):
        render(source)


def test_the_template_is_found_where_transformers_finds_it(tmp_path):
    assert find_template(tmp_path) is None
    several = [{"name": "default", "template": "four"}, {"name": "tool", "template": "other"}]
    write(tmp_path / "tokenizer_config.json", {"chat_template": several})
    assert find_template(tmp_path) == "four"
    write(tmp_path / "chat_template.jinja", "three")
    assert find_template(tmp_path) == "three"
    write(tmp_path / "chat_template.json", {"chat_template": "two"})
    assert find_template(tmp_path) == "two"
    write(tmp_path / "processor_config.json", {"chat_template": "one"})
    assert find_template(tmp_path) == "one"
    write(tmp_path / "processor_config.json", {"chat_template": {"tool": "other"}})
    with pytest.raises(ZooError, match="want one called default"):
        find_template(tmp_path)


# Configurations of pictures.


def test_older_and_newer_files_say_the_same(tmp_path):
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28}
    write(tmp_path / "preprocessor_config.json", {**old, "resample": 3, "do_normalize": True})
    older = read_views(tmp_path)
    new = {
        "image_processor_type": "CLIPImageProcessorFast",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "do_convert_rgb": True,
    }
    write(tmp_path / "processor_config.json", {"image_processor": new})
    assert read_views(tmp_path) == older
    assert older.pipeline.resize == ShortestEdge(28)
    (tmp_path / "processor_config.json").unlink()
    write(tmp_path / "preprocessor_config.json", {"size": 28, "crop_size": 28})
    write(tmp_path / "config.json", {"model_type": "clip"})
    assert read_views(tmp_path) == older
    vit = views_of({"image_processor_type": "ViTImageProcessor", "size": 28})
    assert vit.pipeline.resize == Exactly(28, 28)
    assert vit.pipeline.filter == "bilinear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_flip": True}, "unknown fields .* do_flip"),
        ({"image_processor_type": "FlavaImageProcessor"}, "want one of BitImageProcessor"),
        ({"size": {"longest_edge": 3}}, "size is"),
        ({"resample": 9}, "resample is 9"),
        ({"image_mean": [0.5]}, "mean is"),
        ({"image_std": [0.5, 0, 1]}, "above 0"),
        ({"do_pad": True}, "do_pad is True"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size is"),
    ],
)
def test_settings_that_are_not_understood_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        views_of({"image_processor_type": "CLIPImageProcessor", **change})


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("generation_config.json", {"eos_token_id": "x"}),
        ("preprocessor_config.json", {"crop_size": {"height": [], "width": 28}}),
        ("preprocessor_config.json", {"rescale_factor": "x"}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer_config.json", {"extra_special_tokens": -1}),
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path, file, change):
    path = write_checkpoint(tmp_path) / file
    values = json.loads(path.read_text()) if path.exists() else {}
    write(path, values | change)
    with pytest.raises(ZooError, match="a value that means nothing"):
        load_processor(tmp_path, LLAVA)


def test_a_checkpoint_without_settings_is_refused(tmp_path):
    with pytest.raises(ZooError, match="does not say how pictures are prepared"):
        read_views(tmp_path)


def test_the_middle_is_cut_out_and_black_is_added():
    picture = np.arange(1, 13, dtype=np.uint8).reshape(3, 4, 1).repeat(3, -1)
    assert center_crop(picture, (1, 2))[..., 0].tolist() == [[6, 7]]
    assert center_crop(picture, (4, 4))[..., 0].tolist() == [[0] * 4, *picture[..., 0].tolist()]
    assert center_crop(picture, (5, 2))[:, :, 0].tolist() == [
        [0, 0],
        [2, 3],
        [6, 7],
        [10, 11],
        [0, 0],
    ]


def test_a_picture_without_a_shape_is_refused():
    with pytest.raises(ZooError, match="1 x 3000 pixels would be resized to 224 x 672000"):
        Pipeline(ShortestEdge(224))(np.zeros((3000, 1, 3), np.uint8))
    with pytest.raises(ZooError, match="a square, which may have a side of 16384"):
        Pipeline(ShortestEdge(224), square=True)(np.zeros((20_000, 9, 3), np.uint8))
