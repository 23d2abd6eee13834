"""`zoo arank MODEL`: which layers of a model attend to little, and may skip tokens.

    zoo arank llava-hf/llava-1.5-7b-hf --data scienceqa.json --images pictures --out policy.json

The file is the JSON form of a `GammaMoD`, for training from the same model:

    policy = zoo.models.core.codec.decode(json.loads(Path("policy.json").read_text()))
    zoo.load("llava-hf/llava-1.5-7b-hf", policies=(policy,))
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zoo.models.core.errors import UsageError, ZooError

THRESHOLD = 110.0
"""The published one."""


def main(argv: Sequence[str]) -> int:
    """Run the command line; prints a table or one JSON object.

    Raises:
      UsageError, ZooError: as `zoo.load` and `zoo.compress.arank.attention_ranks`; or no prompts.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    args = _parser().parse_args(argv)
    if (args.data is None) == (not args.prompt):
        raise UsageError("want prompts, from --data FILE or from --prompt TEXT")
    if args.samples < 1:
        raise UsageError(f"--samples is {args.samples}: want 1 or more")
    if args.out is not None and not args.out.parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no folder {args.out.parent}")

    import numpy as np  # after the flags: JAX takes a second to import

    from zoo.compress.arank import attention_ranks, low_layers
    from zoo.generate.autoregressive import padded
    from zoo.loading import load
    from zoo.models.decoders.gamma_mod import GammaMoD

    loaded = load(args.model) if args.dtype is None else load(args.model, dtype=args.dtype)
    if not hasattr(loaded.processor, "encode_prompt"):
        raise UsageError(f"{args.model} does not answer prompts, or has no tokenizer")
    found = []
    for image, prompt in _prompts(args):
        batch = padded(loaded.processor.encode_prompt(image, prompt))
        found.append(attention_ranks(loaded.model, loaded.params, batch))
        print(f"{len(found)} prompts", end="\r", file=sys.stderr)
    ranks = np.mean(found, 0).tolist()
    threshold = args.threshold if args.keep is None else None
    chosen = low_layers(ranks, threshold=threshold, keep=args.keep)
    if args.out is not None:
        _write(args.out, GammaMoD(layers=chosen))
    facts: dict[str, Any] = {"model": args.model, "prompts": len(found), "ranks": ranks}
    facts |= {"threshold": threshold, "keep": args.keep, "layers": chosen}
    print(json.dumps(facts, indent=2) if args.json else _table(ranks, chosen))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo arank",
        description="The rank of the attention maps of every layer, averaged over heads and "
        "prompts; layers of low rank may skip tokens.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the folder of a training run or of a checkpoint, or a name on the Hugging Face hub",
    )
    parser.add_argument("--data", metavar="FILE", help="conversations in the form of LLaVA's")
    parser.add_argument(
        "--images", default=".", metavar="DIR", help="where the pictures of FILE are (%(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=50, metavar="N", help="first questions of FILE (%(default)s)"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="instead; may be repeated"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="for each --prompt, or for all"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--threshold", type=float, default=THRESHOLD, metavar="R", help="skip below (%(default)s)"
    )
    which.add_argument("--keep", type=int, metavar="N", help="skip in all but N layers")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the policy as JSON")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="what the model computes in"
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    return parser


def _prompts(args: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    """Pictures and questions."""
    if args.data is None:
        images = args.image or [None]
        if len(images) not in (1, len(args.prompt)):
            raise UsageError(
                f"got {len(images)} pictures for {len(args.prompt)} prompts: want one for each, "
                "one for all, or none"
            )
        images = images * len(args.prompt) if len(images) == 1 else images
        yield from zip(images, args.prompt, strict=True)
        return
    from zoo.train.data.sources import LlavaJson

    data = LlavaJson(json=args.data, images=args.images, validation=0.0)
    data.prepare(os.curdir)
    source = data.source("train", os.curdir)
    for number in range(min(args.samples, len(source))):
        record = source[number]
        yield record["image"], record["conversations"][0][0]


def _write(path: Path, policy: Any) -> None:
    from zoo.models.core.codec import encode

    try:
        path.write_text(json.dumps(encode(policy), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror}") from error


def _table(ranks: Sequence[float], chosen: Sequence[int]) -> str:
    """The lines that `zoo arank` prints for people."""
    lines = [f"{'layer':>5}{'rank':>10}"]
    for layer, rank in enumerate(ranks):
        lines.append(f"{layer:>5}{rank:>10.2f}{'  may skip tokens' if layer in chosen else ''}")
    return "\n".join([*lines, f"{len(chosen)} of {len(ranks)} layers"])
