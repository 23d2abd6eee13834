"""What methods for fewer vision tokens leave of a prompt, and what that costs: a table of
`benchmarks/figures.py`.
"""

import functools
import statistics
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from benchmarks.counting import TERA, Figure, Section, counted, without_head
from zoo.costing import measure
from zoo.models.connectors.fourier_vlm import FourierVLM
from zoo.models.core import registry
from zoo.models.reduction.atp_llava import ATP
from zoo.models.reduction.crossget.dual import with_cross_tokens
from zoo.models.reduction.fastervlm import FasterVLM
from zoo.models.reduction.hired import HiRED
from zoo.models.reduction.llmc_plus.decoder import FastV
from zoo.models.reduction.llmc_plus.sparsevlm import SparseVLM
from zoo.models.reduction.mmtok import MMTok
from zoo.models.reduction.recoverable_compression import RecoverableCompression
from zoo.models.reduction.yopo import Yopo, linear_share
from zoo.models.reduction.zipvl import ZipVL

LLAVA, NEXT, VIDEO = "llava_1_5_7b", "llava_next_vicuna_7b", "llava_onevision_qwen2_7b"
AIM_VIDEO = "aim_llava_onevision_7b"
FRAMES = {"num_images": 32, "num_slots": 32 * 196 + 1}  # of a video, with a newline at its end
TILES = 5  # of a picture, the whole one among them
TILES_ALONE = {"num_images": TILES, "num_slots": None, "newline": False}  # without newlines
THRESHOLDS = (ATP((82, 82, 82), layers=(4, 14, 24)),)  # 144 tokens on the mean of all layers
RECOVERED_TEXT = 58  # tokens of text, fitted to the paper's FLOPs of the whole model


def entering(name: str, **settings: Any) -> int:
    """Vision tokens that the decoder is given."""
    slots: int = registry.config(name, **settings).slots
    return slots


def mean_tokens(
    name: str,
    *,
    plain: str = LLAVA,
    sizes: Mapping[str, int] | None = None,
    text: int = 1,
    **settings: Any,
) -> float:
    """Vision tokens that a layer of the decoder runs, on the mean of all its layers, by what these
    cache.

    Args:
      name: of a model whose caches are not quantised.
      plain: the model without the method.
      sizes: settings of the plain model that make its decoder see as many tokens as it can.
      text: tokens of text.
      **settings: of the model.
    """
    dense = counted(plain, text_tokens=text, **(sizes or {}))
    place = dense.kv_bytes["per_layer"][0] / (text + dense.vision_tokens)
    found = counted(name, text_tokens=text, **settings).kv_bytes["per_layer"]
    return statistics.mean(size / place - text for size in found)


def on_vision(name: str, **settings: Any) -> float:
    """10^12 multiplications of the decoder's layers on vision tokens: those of a prompt with one
    token of text, without those of this token alone.
    """
    whole = counted(name, text_tokens=1, **settings)
    text = counted(LLAVA, text_tokens=1, num_images=0)
    return (without_head(whole) - without_head(text)) / 2


def saved(name: str, plain: str = LLAVA, **settings: Any) -> float:
    """By how much that is less than of the model without a method, in per cent."""
    same = {key: settings[key] for key in ("num_images",) if key in settings}
    return 100 * (1 - on_vision(name, **settings) / on_vision(plain, **same))


def attention(name: str, **settings: Any) -> float:
    """FLOPs of products between activations, over a prompt with one token of text."""
    found = counted(name, text_tokens=1, **settings).flops["prefill"]
    return (found.total - found.weights) / TERA


def zipvl_saved(share: float) -> float:
    """Products of attention that ZipVL leaves out at a share of important tokens, in per cent."""
    policy = ZipVL(keep=share)
    settings = {"num_images": TILES}
    fewer = attention(NEXT, policies=(policy,), **settings)
    return 100 * (1 - fewer / attention(NEXT, **settings))


def whole_prompt(text: int, **settings: Any) -> float:
    """TFLOPs of the decoder's layers over a picture and so many tokens of text."""
    return without_head(counted(LLAVA, text_tokens=text, **settings))


def cache_saved(**settings: Any) -> float:
    """By how much the cache of vision tokens is smaller than without a method, in per cent."""
    return 100 * (1 - mean_tokens(LLAVA, **settings) / 576)


def clip_share(r: int) -> float:
    """What merging r tokens in every layer that reads the picture leaves of the FLOPs of both
    encoders of CLIP, in per cent.
    """

    def flops(config: Any) -> int:
        model, batch = config.build(), config.inputs(1)
        shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
        return measure(model.apply, shapes, batch)[0].total

    plain = registry.config("clip_vit_b16")
    return 100 * flops(with_cross_tokens(plain, r=r)) / flops(plain)


def aim_fold() -> float:
    """How many times fewer FLOPs a video takes with AIM."""
    dense = counted(VIDEO, text_tokens=100, **FRAMES)
    return without_head(dense) / without_head(counted(AIM_VIDEO, text_tokens=100))


def yopo_share() -> float:
    """What YOPO's training script leaves of the products of vision tokens with weights."""
    decoder = registry.config("yopo_llava_1_5_13b").decoder
    heads = ((True,) * 30 + (False,) * 10,) * decoder.depth
    policy = Yopo(window=5, heads=heads, mlp_ratio=2, layers=20)
    return 100 * linear_share(policy, decoder)


def _fewer(paper: dict[int, float], make: Any, label: str) -> tuple[Figure, ...]:
    return tuple(
        Figure(
            f"{label}, {keep} tokens, FLOPs less, %",
            functools.partial(saved, LLAVA, reducer=make(keep)),
            less,
            1,
        )
        for keep, less in paper.items()
    )


AS_RUN = "A layer that drops tokens has run them; the paper counts it with what it leaves."
FASTV = ((2, 288, 306, 2.01), (2, 144, 171, 1.12), (3, 128, 170, 1.11))
SPARSE = {192: ((300, 200, 110), 188), 128: ((303, 110, 36), 124), 64: ((66, 30, 17), 62)}

REDUCTION = Section(
    "reduction",
    "Fewer vision tokens",
    "Vision tokens, and FLOPs of the decoder's layers on vision tokens (in T: a multiply and an "
    "add as one), of a model of 7B parameters with one picture (of five tiles for LLaVA-NeXT) "
    "where nothing else is said. FLOPs are those of the whole program: what a method computes to "
    "choose is among them. The papers' are their own numbers, or follow from their settings by the "
    "formula that they count with, 4nd² + 2n²d + 3ndm a layer. What depends on the picture "
    "(ZipVL's share of important tokens, the numbers of Recoverable Compression) is not counted "
    "but set to what the paper measured; so are the 144 tokens that ATP-LLaVA's thresholds are "
    "trained for. No line: FoPru, whose paper could not be read; BUS and LRS-VQA, which give no "
    "counts; YOPO's 12 % and ZipVL with 64 frames, whose settings are not public; and what needs "
    "trained weights, such as ZipVL's shares of important tokens.",
    (
        Figure(
            "PyramidDrop, LLaVA-1.5, mean tokens",
            lambda: mean_tokens("pyramiddrop_llava_1_5_7b"),
            270,
            0,
        ),
        Figure(
            "PyramidDrop, LLaVA-1.5, FLOPs, T",
            lambda: on_vision("pyramiddrop_llava_1_5_7b"),
            1.777,
            3,
            "Ranking takes the queries and keys of three layers once more.",
        ),
        Figure(
            "PyramidDrop, LLaVA-NeXT, mean tokens",
            lambda: mean_tokens(
                "pyramiddrop_llava_next_7b", plain=NEXT, sizes=TILES_ALONE, **TILES_ALONE
            ),
            1350,
            0,
        ),
        Figure(
            "PyramidDrop, LLaVA-NeXT, FLOPs less, %",
            lambda: saved("pyramiddrop_llava_next_7b", NEXT, num_images=TILES),
            55,
            1,
            "The formula has 54.6 %; ranking takes the queries and keys of three layers once more.",
        ),
        *_fewer({288: 50.6, 144: 75.4, 58: 90.1, 29: 95.1}, FasterVLM, "FasterVLM"),
        Figure(
            "FasterVLM, LLaVA-NeXT at 29 of each tile, tokens",
            lambda: entering(NEXT, num_images=TILES, reducer=FasterVLM(29)),
            145,
            0,
        ),
        Figure(
            "HiRED, LLaVA-NeXT at a rate of 0.2, tokens",
            lambda: entering(NEXT, num_images=TILES, reducer=HiRED(0.2)),
            576,
            0,
        ),
        Figure(
            "HiRED, LLaVA-NeXT at a rate of 0.2, tokens of the picture seen whole",
            lambda: HiRED(0.2).split(TILES, 576)[0],
            288,
            0,
        ),
        Figure("MMTok, tokens", lambda: entering(LLAVA, reducer=MMTok(4)), 4, 0),
        Figure(
            "MMTok, LLaVA-NeXT at 32 of each tile, tokens",
            lambda: entering(NEXT, num_images=TILES, reducer=MMTok(32)),
            160,
            0,
        ),
        *_fewer({144: 75.4, 64: 89.0}, FourierVLM, "Fourier-VLM"),
        Figure(
            "Fourier-VLM, 100 tokens, FLOPs less, %",
            lambda: saved(LLAVA, reducer=FourierVLM(100)),
            83.8,
            1,
            "The paper's names no setting; this one is nearest.",
        ),
        Figure(
            "AIM, LLaVA-OneVision, 32 frames, tokens",
            lambda: counted(AIM_VIDEO, text_tokens=100).vision_tokens,
            1568,
            0,
        ),
        Figure(
            "AIM, LLaVA-OneVision, 32 frames, mean tokens",
            lambda: mean_tokens(AIM_VIDEO, plain=VIDEO, sizes=FRAMES, text=100),
            980,
            0,
            AS_RUN,
        ),
        Figure(
            "AIM, LLaVA-OneVision with 100 tokens of text, FLOPs, times fewer",
            aim_fold,
            6.74,
            2,
            f"{AS_RUN} The abstract says 7.",
        ),
        Figure("AIM, LLaVA-1.5, tokens", lambda: entering("aim_llava_1_5_7b"), 72, 0),
        Figure(
            "AIM, LLaVA-1.5, mean tokens",
            lambda: mean_tokens("aim_llava_1_5_7b"),
            37.2,
            1,
            AS_RUN,
        ),
        Figure("CrossGET, tokens", lambda: entering("crossget_llava_1_5_7b"), 278, 0),
        *(
            Figure(
                f"CrossGET, CLIP ViT-B/16 with {r} merged in a layer, FLOPs, %",
                functools.partial(clip_share, r),
                share,
                0,
                "The published one is a round number.",
            )
            for r, share in ((16, 58), (12, 69), (8, 80))
        ),
        Figure(
            "ATP-LLaVA, 144 tokens, cache less, %",
            lambda: cache_saved(policies=THRESHOLDS),
            75,
            1,
        ),
        Figure(
            "ATP-LLaVA, 144 tokens, FLOPs less, %",
            lambda: saved(LLAVA, policies=THRESHOLDS),
            78.1,
            1,
            "The paper's are measured, with numbers that differ from picture to picture.",
        ),
        Figure(
            "P-Sigmoid, a budget of an eighth, mean tokens",
            lambda: mean_tokens(LLAVA, policies=registry.reducer("p_sigmoid", 0.125)),
            72,
            0,
        ),
        *(
            Figure(
                f"FastV, before layer {layer}, {keep} tokens, {unit}",
                functools.partial(count, LLAVA, policies=(FastV(keep, layer),)),
                paper,
                digits,
                "Ranking takes the attention of one row once more.",
            )
            for layer, keep, mean, flops in FASTV
            for unit, count, paper, digits in (
                ("mean tokens", mean_tokens, mean, 0),
                ("FLOPs, T", on_vision, flops, 2),
            )
        ),
        *(
            Figure(
                f"SparseVLM, {name} tokens, mean tokens",
                functools.partial(mean_tokens, LLAVA, policies=(SparseVLM(keep),)),
                paper,
                0,
                AS_RUN,
            )
            for name, (keep, paper) in SPARSE.items()
        ),
        Figure(
            "ZipVL, LLaVA-NeXT, 42.1 % important, products of attention less, %",
            functools.partial(zipvl_saved, 0.421),
            82.3,
            1,
            "The paper's, of LongVA, leaves out the rows that are probed.",
        ),
        Figure(
            f"Recoverable Compression, none, {RECOVERED_TEXT} tokens of text, TFLOPs",
            lambda: whole_prompt(RECOVERED_TEXT),
            8.5,
            1,
        ),
        Figure(
            f"Recoverable Compression, a tenth, {RECOVERED_TEXT} tokens of text, TFLOPs",
            lambda: whole_prompt(RECOVERED_TEXT, reducer=RecoverableCompression(58)),
            1.5,
            1,
        ),
        Figure(
            "YOPO, LLaVA-1.5-13B, products of vision tokens with weights, %",
            yopo_share,
            25,
            0,
            "The paper's is a round name; ours leaves out attention.",
        ),
        Figure(
            "SimVLG, tokens of a picture of 257",
            lambda: counted("simvlg_opt_2_7b", text_tokens=8).vision_tokens,
            29,
            0,
        ),
    ),
)
