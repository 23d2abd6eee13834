"""`zoo export SRC DST`: a converted or trained model in the Hugging Face layout."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Raises:
      UsageError, ZooError: as `zoo.convert.export.export` and `zoo.convert.trained`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    parser = argparse.ArgumentParser(
        prog="zoo export",
        description="Write a converted model as the Hugging Face checkpoint that it was, or a "
        "trained one as the checkpoint that it has become.",
    )
    parser.add_argument(
        "source", metavar="SRC", help="a folder that `zoo convert` has made, or that of a run"
    )
    parser.add_argument("destination", metavar="DST", help="a folder that is new or empty")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run that has trained low-rank adapters, only these, in the layout of peft; "
        "without this flag they are merged into the model",
    )
    args = parser.parse_args(argv)

    from zoo.convert.export import export  # after the flags: JAX takes a second to import
    from zoo.convert.trained import export_adapter, export_trained, is_trained

    if args.adapter:
        done = export_adapter(args.source, args.destination)
    else:
        run = export_trained if is_trained(args.source) else export
        done = run(args.source, args.destination)
    if args.json:
        print(json.dumps(asdict(done), indent=2))
    else:
        files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
        print(f"{done.folder}: {done.tensors} tensors, {done.bytes:,} bytes, in {files}")
    return 0
