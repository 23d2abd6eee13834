"""`zoo generate RUN --image FILE --prompt TEXT`: ask a trained model about a picture."""

import argparse
import json
from collections.abc import Sequence

from zoo.models.core.errors import UsageError


def main(argv: Sequence[str]) -> int:
    """Run the command line and print the answer.

    Raises:
      UsageError, ZooError: as `zoo.load` and `Loaded.generate`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    args = _parser().parse_args(argv)
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {args.max_new_tokens}: want 1 or more")

    from zoo.cache import keep_compiled_programs  # after the flags: JAX takes a second to import
    from zoo.loading import load

    keep_compiled_programs()
    loaded = load(args.run)
    answer = loaded.generate(
        args.image, args.prompt, budget=args.budget, max_new_tokens=args.max_new_tokens
    )
    if args.json:
        facts = {
            "prompt": args.prompt,
            "answer": answer,
            "budget": args.budget,
            "image": args.image,
            "run": args.run,
        }
        print(json.dumps(facts, indent=2))
    else:
        print(answer)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo generate", description="Ask a trained model about a picture."
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a training run")
    parser.add_argument("--image", required=True, metavar="FILE", help="any picture file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument(
        "--budget", type=int, metavar="M", help="vision tokens for the picture; by default all"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="length of the longest answer"
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    return parser
