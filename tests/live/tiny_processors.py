"""Small processors as transformers saves them, with vocabularies made on the spot."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests.live.reference import transformers
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig
from zoo.models.parts.connect.pixel_shuffle import PixelShuffle
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.towers.qwen_vit import QwenViTConfig
from zoo.models.parts.towers.vit import ViTConfig

TEXTS = [
    "What is in the picture? A cat and a dog sit on the mat.",
    "USER: describe the image. ASSISTANT: There are three boats and two people.",
    "How many digits are there? 0 1 2 3 4 5 6 7 8 9, said the user to the assistant.",
    "Naïve café, ﬁne: 漢字 and Ω. <image> is a word; system, user, assistant.\n",
] * 8

STRANGE = (
    "What is this?",
    " a leading space",
    "  two  leading",
    "trailing  ",
    "tabs\tand\nlines\n\n  x",
    "naïve café ﬁne Ω 漢字 🦓🏽",
    "don't 12345 3.14 #$%^& ΑΣ",
    "see </s> here<s>",
)


def spm(kind: str, *, byte_fallback: bool, size: int = 420, **options) -> bytes:
    """A SentencePiece file, `kind` "bpe" or "unigram"."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=file,
        model_type=kind,
        vocab_size=size,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return file.getvalue()


def llama_spm() -> bytes:
    """The form of Llama's `tokenizer.model`."""
    return spm(
        "bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
    )


def write_json(file: Path, **values) -> None:
    """One object as a file; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values), "utf-8")


def write_llama(folder: Path, **settings) -> None:
    """Llama's tokenizer as `tokenizer.model`."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **named, **settings
    )
    (folder / "tokenizer.model").write_bytes(llama_spm())


def write_older_llama(folder: Path, architecture: str) -> None:
    """A `tokenizer.json` in the form of 2023, which transformers reads in one of two ways."""
    write_llama(folder / "spm")
    fast = transformers.LlamaTokenizer.from_pretrained(folder / "spm").backend_tokenizer
    fast.pre_tokenizer = None
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    image = {"content": "<image>", "normalized": False, **flags}
    pad = {"content": "<pad>", "normalized": True, **flags}
    size = fast.get_vocab_size()
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        legacy=False,
        add_bos_token=True,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        image_token="<image>",
        added_tokens_decoder={str(size): image, str(size + 1): pad},
    )
    write_json(folder / "config.json", model_type=architecture)


def write_siglip(folder: Path, rule: str = "nmt_nfkc") -> None:
    """SigLIP's tokenizer as `spiece.model`."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    model = spm("unigram", byte_fallback=False, size=200, normalization_rule_name=rule, **ids)
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="SiglipTokenizer",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )
    (folder / "spiece.model").write_bytes(model)


def write_opt(folder: Path) -> None:
    """OPT's tokenizer as `vocab.json` and `merges.txt`."""
    vocab, merges = byte_bpe()
    vocab |= {"<pad>": len(vocab), "</s>": len(vocab) + 1}
    write_json(folder / "vocab.json", **vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    end = {"__type": "AddedToken", "content": "</s>", **flags}
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="GPT2Tokenizer",
        add_bos_token=True,
        add_prefix_space=False,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token={**end, "content": "<pad>"},
    )
    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    write_json(folder / "special_tokens_map.json", **named)
    write_json(folder / "config.json", model_type="opt")


def write_clip(folder: Path) -> None:
    """CLIP's tokenizer, letters and two merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "at</w>", "cat</w>"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("a", "t</w>"), ("c", "at</w>")]
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", model_type="clip")


def write_bert(folder: Path) -> None:
    """BERT's tokenizer, letters and two words."""
    letters = sorted({letter for text in TEXTS for letter in text.lower()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *("##" + letter for letter in letters), "cat", "##ing"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    transformers.BertTokenizer(vocab=vocab).save_pretrained(folder)
    write_json(folder / "config.json", model_type="bert")


def byte_bpe(size: int = 400) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of byte-level byte-pair encoding."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS, trainer)
    merges = json.loads(fast.to_str())["model"]["merges"]
    return fast.get_vocab(), [tuple(pair) for pair in merges]


def qwen_tokenizer(**named: str):
    """Qwen2's tokenizer with the tokens of its chats, and further ones that have a name."""
    vocab, merges = byte_bpe()
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|vision_start|>", "<|vision_end|>"],
        model_specific_special_tokens=named,
    )


def write_qwen(folder: Path) -> None:
    """Qwen2's tokenizer."""
    qwen_tokenizer(image_token="<|image_pad|>").save_pretrained(folder)
    write_json(folder / "config.json", model_type="qwen2_vl")


# Processors. Each function writes one into a folder and returns it with a model's configuration.

_VICUNA = """{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() }}: {% endif -%}
{% for part in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}
{% endfor %}{% if m.role != 'assistant' %}
{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}
{% else %}{% for part in m.content | selectattr('type', 'equalto', 'text') -%}
{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor -%}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

_MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}
{{ m.content[0].text }}{{ eos_token }}{% else %}[INST] {% for part in m.content -%}
{% if part.type == 'image' %}<image>
{% elif part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %} [/INST]{% endif %}
{% endfor %}"""

_CHATML = """{% set n = namespace(value=0) %}{% for m in messages %}
{% if loop.first and m['role'] != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}<|im_end|>
{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' or 'image' in part %}
{% set n.value = n.value + 1 %}{% if numbered %}Picture {{ n.value }}: {% endif -%}
IMAGE{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_TOWER = ViTConfig(image_size=28, patch_size=14, width=8, depth=2, num_heads=2, mlp_dim=8)
_DECODER = DecoderConfig(vocab_size=500, width=8, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=8)
_PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def llava(folder: Path):
    """LLaVA-1.5: Vicuna's conversations, `tokenizer.model` behind them, one tile."""
    theirs = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size=28, crop_size=28),
        tokenizer=_llama_with_image(folder),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_VICUNA,
    )
    theirs.save_pretrained(folder)
    write_json(folder / "config.json", model_type="llava", eos_token_id=2)
    return theirs, LlavaConfig(_TOWER, decoder=_DECODER, image_id=theirs.image_token_id)


def llava_next(folder: Path):
    """LLaVA-NeXT: Mistral's conversations, tiles of 28 pixels."""
    theirs = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=28, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=_llama_with_image(folder),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_MISTRAL,
    )
    theirs.save_pretrained(folder)
    write_json(folder / "config.json", model_type="llava_next")
    config = LlavaConfig(_TOWER, decoder=_DECODER, newline=True, image_id=theirs.image_token_id)
    return theirs, config


def llava_onevision(folder: Path):
    """LLaVA-OneVision: at most two tiles' worth of tokens, one tile for each of several."""
    size = {"height": 28, "width": 28}
    theirs = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessorPil(
            size=size, image_grid_pinpoints=[[28 * h, 28 * w] for h in (1, 2, 3) for w in (1, 2, 3)]
        ),
        tokenizer=qwen_tokenizer(image_token="<image>", video_token="<video>"),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=_CHATML.replace("IMAGE", "<image>\n"),
    )
    theirs.save_pretrained(folder)
    write_json(folder / "config.json", model_type="llava_onevision")
    config = LlavaConfig(_TOWER, decoder=_DECODER, newline=True, image_id=theirs.image_token_id)
    return theirs, config


def internvl(folder: Path):
    """InternVL: up to four tiles and a thumbnail, one token each, between two control tokens."""
    size = {"height": 28, "width": 28}
    theirs = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessorPil(size=size, max_patches=4),
        tokenizer=qwen_tokenizer(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=1,
        chat_template=_CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    theirs.save_pretrained(folder)
    write_json(folder / "config.json", model_type="internvl")
    config = LlavaConfig(
        _TOWER, PixelShuffle(), _DECODER, vision_layer=-1, image_id=theirs.image_token_id
    )
    return theirs, config


def qwen2_vl(folder: Path, **tower):
    """Qwen2-VL: pictures of at most 56 x 84 pixels."""
    theirs = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(
            min_pixels=28 * 28, max_pixels=56 * 84
        ),
        tokenizer=qwen_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>"),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=_CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    theirs.save_pretrained(folder)
    write_json(folder / "config.json", model_type="qwen2_vl")
    small = QwenViTConfig(width=16, depth=1, num_heads=2, mlp_dim=8, **tower)
    ids = {"image_id": theirs.image_token_id, "video_id": theirs.video_token_id}
    return theirs, QwenVLConfig(small, _DECODER, **ids)


def qwen2_5_vl(folder: Path):
    """Qwen2.5-VL: the same with windows."""
    return qwen2_vl(folder, window_size=56)


def qwen3_vl(folder: Path):
    """Qwen3-VL: pictures of at most 64 x 96 pixels."""
    theirs = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(
            size={"shortest_edge": 32 * 32, "longest_edge": 64 * 96},
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=qwen_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>"),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=_CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    theirs.save_pretrained(folder)
    write_json(folder / "config.json", model_type="qwen3_vl")
    small = QwenViTConfig(patch_size=16, width=16, depth=1, num_heads=2, mlp_dim=8)
    ids = {"image_id": theirs.image_token_id, "video_id": theirs.video_token_id}
    return theirs, QwenVLConfig(small, _DECODER, **ids, time_in_text=True, image_size=64)


FAMILIES = {
    make.__name__: make
    for make in (llava, llava_next, llava_onevision, internvl, qwen2_vl, qwen2_5_vl, qwen3_vl)
}


def _llama_with_image(folder: Path):
    write_llama(folder / "spm", add_bos_token=True)
    named = {"image_token": "<image>", "pad_token": "<pad>"}
    return transformers.LlamaTokenizer.from_pretrained(folder / "spm", **named)
