"""`zoo convert SRC DST`: a Hugging Face checkpoint to a folder of this zoo."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Raises:
      UsageError, ZooError: as `zoo.convert.convert.convert`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    parser = argparse.ArgumentParser(
        prog="zoo convert",
        description="Convert a Hugging Face checkpoint. A rerun after an interruption goes on.",
    )
    parser.add_argument(
        "source", metavar="SRC", help="a checkpoint folder, or organisation/name[@revision]"
    )
    parser.add_argument("destination", metavar="DST", help="a folder that is new or empty")
    parser.add_argument("--json", action="store_true", help="print one object")
    args = parser.parse_args(argv)

    from zoo.convert.convert import convert  # after the flags: JAX takes a second to import

    done = convert(args.source, args.destination, _say)
    if args.json:
        print(json.dumps(asdict(done), indent=2))
        return 0
    print(f"{done.folder}: {done.tensors} tensors, {done.bytes:,} bytes, in {done.parts} parts")
    if done.resumed:
        print(f"{done.resumed} of the parts were there already", file=sys.stderr)
    if done.dropped:
        print(f"{len(done.dropped)} buffers left out, which are computed here", file=sys.stderr)
    return 0


def _say(line: str) -> None:
    """Progress, where somebody watches."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)
