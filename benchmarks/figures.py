"""What methods cost, ours beside the papers': `python benchmarks/figures.py`.

Writes `docs/figures.json` (our numbers, counted by `zoo.cost` over the programs as they are traced)
and `docs/figures.md` (tables of them). With `--check` it only says whether they are up to date.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.counting import TERA, Figure, Section, counted, without_head
from benchmarks.reduction_figures import REDUCTION
from zoo.costing import Cost
from zoo.models.base.llava import VARIANTS as LLAVA
from zoo.models.connectors.deepstack import DeepStack
from zoo.models.decoders.gamma_mod import GammaMoD

ROOT = Path(__file__).parents[1]
NUMBERS, TABLES = "docs/figures.json", "docs/figures.md"


# p-MoD


def p_mod(name: str, dense: bool = False) -> Cost:
    """A p-MoD model, or the dense one that it is compared with, as its paper counts."""
    return counted(name, text_tokens=58, **({"policies": ()} if dense else {}))


def weights(found: Cost) -> float:
    """TFLOPs of products with weights in the prefill, with logits everywhere."""
    return found.flops["prefill"].weights / TERA


def vision_cache(name: str) -> float:
    """Keys and values that a p-MoD model keeps of vision tokens, in per cent of the dense one's."""
    mod, dense = p_mod(name), p_mod(name, dense=True)
    place = dense.kv_bytes["total"] / (dense.text_tokens + dense.vision_tokens)
    text = place * dense.text_tokens
    return 100 * (mod.kv_bytes["total"] - text) / (dense.kv_bytes["total"] - text)


V1_5, NEXT = "p_mod_llava_1_5_7b", "p_mod_llava_next_7b"
P_MOD = Section(
    "p_mod",
    "p-MoD",
    "TFLOPs of the decoder's products with weights over a prompt of 58 text tokens (a number that "
    "the paper does not state and that fits its table) and one picture, with logits at every "
    "position, without attention scores and without the tower.",
    (
        Figure("LLaVA-1.5-7B, TFLOPs", lambda: weights(p_mod(V1_5, dense=True)), 8.38),
        Figure("p-MoD-LLaVA-1.5-7B, TFLOPs", lambda: weights(p_mod(V1_5)), 4.92),
        Figure(
            "p-MoD-LLaVA-1.5-7B, vision tokens in the caches, %",
            lambda: vision_cache(V1_5),
            53.8,
            1,
        ),
        Figure("LLaVA-NeXT-7B, TFLOPs", lambda: weights(p_mod(NEXT, dense=True)), 39.46),
        Figure("p-MoD-LLaVA-NeXT-7B, TFLOPs", lambda: weights(p_mod(NEXT)), 21.94),
        Figure(
            "p-MoD-LLaVA-NeXT-7B, vision tokens in the caches, %",
            lambda: vision_cache(NEXT),
            53.8,
            1,
        ),
    ),
)


# MQT


def mqt(budget: int) -> float:
    """MQT-LLaVA at a budget of vision tokens."""
    return without_head(counted("mqt_llava_7b", text_tokens=90, budget=budget))


PLOT = "The paper's is read off a plot with a logarithmic axis."
MQT_PAPER = {256: 4.5, 144: 2.8, 64: 2.0, 36: 1.6, 16: 1.3, 8: 1.2, 4: None, 2: None}
MQT = Section(
    "mqt",
    "Matryoshka Query Transformer",
    "TFLOPs of the decoder's layers, with attention, over a prompt of 90 text tokens (fitted to "
    "the paper's plot) and one picture of so many vision tokens.",
    (
        Figure(
            "LLaVA-1.5-7B, 576 tokens",
            lambda: without_head(counted("llava_1_5_7b", text_tokens=90)),
            8.7,
            1,
            PLOT,
        ),
        *(
            Figure(f"MQT-LLaVA-7B, {m} tokens", functools.partial(mqt, m), paper, 1, PLOT)
            for m, paper in MQT_PAPER.items()
        ),
    ),
)


# γ-MoD


def gamma_mod(tokens: int, skipped: float, images: int, side: int, large: bool) -> float:
    """A decoder whose layers compute all but a share of a prompt, as published: the pictures' slots
    and 35 more tokens are what may be left out.
    """
    slots = images * (side // 14) ** 2
    text, prefix = tokens - slots, slots + GammaMoD().text_prefix
    left_out = tokens - int(tokens * (1 - skipped))
    policy = GammaMoD(capacity=1 - left_out / prefix)
    settings: dict[str, Any] = {"policies": (policy,) if skipped else ()}
    if large:
        big = LLAVA["llava_1_5_13b"].decoder
        settings["decoder"] = dataclasses.replace(big, vocab_size=32_000)
    found = counted(
        "gamma_mod_llava_7b", text_tokens=text, num_images=images, image_size=side, **settings
    )
    return without_head(found)


GAMMA_PAPER = {  # tokens of the prompt, pictures, their side, whether 13B; skipped: published
    "LLaVA-7B": ((800, 1, 336, False), {0.0: 10.7, 0.31: 7.7, 0.564: 5.3}),
    "LLaVA-HR-7B": ((1400, 1, 448, False), {0.0: 19.2, 0.379: 12.6, 0.577: 9.3}),
    "Mini-Gemini-HD-7B": ((4000, 5, 336, False), {0.0: 60.2, 0.362: 39.4, 0.581: 27.8}),
    "LLaVA-HR-13B": ((1400, 1, 448, True), {0.0: 37.1, 0.349: 25.1, 0.551: 18.4}),
}
GAMMA_MOD = Section(
    "gamma_mod",
    "γ-MoD",
    "TFLOPs of the decoder's layers, with attention, over a prompt of so many tokens (1400 by the "
    "official script, 800 and 4000 fitted to the paper's table), of which all but four layers skip "
    "a share, as measured in the paper. Here that share is `capacity`, which bounds what a prefill "
    "computes. The decoders are those named, the pictures 576, 1024, 5 x 576 and 1024 tokens.",
    tuple(
        Figure(
            f"{name}, {n} tokens, {100 * skipped:.3g} % skipped",
            functools.partial(gamma_mod, n, skipped, images, side, large),
            paper,
            1,
        )
        for name, ((n, images, side, large), row) in GAMMA_PAPER.items()
        for skipped, paper in row.items()
    ),
)


# DeepStack


def of_llava(name: str, part: str, **settings: Any) -> float:
    """FLOPs of a part of a model, as many times those of LLaVA-1.5 with the same vocabulary."""
    dense = counted("deepstack_l_vicuna_7b", text_tokens=58, policies=())
    return counted(name, text_tokens=58, **settings).flops[part].total / dense.flops[part].total


def seen(name: str) -> float:
    """Vision tokens that all views of a picture have: those of the sequence and of the groups."""
    found = counted(name, text_tokens=58)
    return found.vision_tokens * (1 + DeepStack().groups)


L, HD, V = "deepstack_l_vicuna_7b", "deepstack_l_hd_vicuna_7b", "deepstack_v_vicuna_7b"
NEWLINES = "Ours counts the newline after each of 48 rows of tiles."
DEEPSTACK = Section(
    "deepstack",
    "DeepStack",
    "The decoder reads as many tokens as LLaVA-1.5's, with an addition at four of its layers; "
    "tower and connector read five views of a picture instead of one. FLOPs are given as multiples "
    "of LLaVA-1.5-7B's, with 58 text tokens. The last layer of the tower is not run, as in LLaVA.",
    (
        Figure(
            "DeepStack-L, vision tokens in the sequence",
            lambda: counted(L, text_tokens=58).vision_tokens,
            576,
            0,
        ),
        Figure("DeepStack-L, vision tokens in all", lambda: seen(L), 2880, 0),
        Figure("DeepStack-L, FLOPs of the decoder", lambda: of_llava(L, "prefill"), 1, 3),
        Figure("DeepStack-L, FLOPs of tower and connector", lambda: of_llava(L, "encode"), 5, 3),
        Figure(
            "DeepStack-L, parameters",
            lambda: (
                counted(L, text_tokens=58).params["total"]
                / counted(L, text_tokens=58, policies=()).params["total"]
            ),
            1,
            3,
        ),
        Figure(
            "DeepStack-L-HD, vision tokens in the sequence",
            lambda: counted(HD, text_tokens=58).vision_tokens,
            2880,
            0,
            NEWLINES,
        ),
        Figure("DeepStack-L-HD, vision tokens in all", lambda: seen(HD), 14_400, 0, NEWLINES),
        Figure(
            "DeepStack-V, vision tokens in the sequence",
            lambda: counted(V, text_tokens=58).vision_tokens,
            576,
            0,
        ),
        Figure("DeepStack-V, FLOPs of the decoder", lambda: of_llava(V, "prefill"), 1, 3),
        Figure(
            "DeepStack-V, FLOPs of tower and connector (12 of 23 layers five times)",
            lambda: of_llava(V, "encode"),
            None,
            2,
        ),
    ),
)

SECTIONS = (MQT, P_MOD, GAMMA_MOD, DEEPSTACK, REDUCTION)


def count() -> dict[str, dict[str, float]]:
    """Our numbers: {slug: {line: number}}."""
    return {s.slug: {f.what: round(f.ours(), 6) for f in s.figures} for s in SECTIONS}


def render(numbers: dict[str, dict[str, float]]) -> str:
    """The text of `docs/figures.md`."""
    lines = [
        "# What the methods cost",
        "",
        "<!-- Written by `python benchmarks/figures.py`; edits are lost. -->",
        "",
        "Ours are counted by `zoo.cost` over the programs that run, from shapes alone; those of",
        "the papers are as published. What the clock says, `benchmarks/pillars.py` and",
        "`benchmarks/reduction.py` measure.",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section.title}", "", section.text, ""]
        lines += ["| | ours | paper | difference | why |", "|---|---:|---:|---:|---|"]
        lines += [_line(figure, numbers[section.slug][figure.what]) for figure in section.figures]
    return "\n".join(lines) + "\n"


def _line(figure: Figure, ours: float) -> str:
    shown = f"{ours:,.{figure.digits + (figure.digits > 0)}f}"
    if figure.paper is None:
        return f"| {figure.what} | {shown} | | | |"
    differs = ours / figure.paper - 1
    why = figure.why if abs(differs) > 0.01 else ""
    paper = f"{figure.paper:,.{figure.digits}f}"
    per_cent = round(100 * differs, 1) + 0.0  # no -0.0
    return f"| {figure.what} | {shown} | {paper} | {per_cent:+.1f} % | {why} |"


def main(argv: list[str] | None = None) -> int:
    """Write both files, or with `--check` return 1 if they are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    numbers = count()
    texts = {NUMBERS: json.dumps(numbers, indent=2) + "\n", TABLES: render(numbers)}
    old = [
        p
        for p, text in texts.items()
        if not (ROOT / p).is_file() or (ROOT / p).read_text("utf-8") != text
    ]
    for path in old:
        if not args.check:
            (ROOT / path).write_text(texts[path], "utf-8")
        print(f"{'out of date' if args.check else 'wrote'}: {path}", file=sys.stderr)
    return 1 if old and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
