"""`zoo export SRC DST`: a converted model back to the Hugging Face layout."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Raises:
      UsageError, ZooError: as `zoo.convert.export.export`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    parser = argparse.ArgumentParser(
        prog="zoo export", description="Write a converted model as a Hugging Face checkpoint."
    )
    parser.add_argument("source", metavar="SRC", help="a folder that `zoo convert` has made")
    parser.add_argument("destination", metavar="DST", help="a folder that is new or empty")
    parser.add_argument("--json", action="store_true", help="print one object")
    args = parser.parse_args(argv)

    from zoo.convert.export import export  # after the flags: JAX takes a second to import

    done = export(args.source, args.destination)
    if args.json:
        print(json.dumps(asdict(done), indent=2))
    else:
        files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
        print(f"{done.folder}: {done.tensors} tensors, {done.bytes:,} bytes, in {files}")
    return 0
