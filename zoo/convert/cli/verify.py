"""`zoo verify SRC`: a checkpoint here and in the original code, layer by layer."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Returns:
      0 if everything agrees, else 1.

    Raises:
      UsageError, ZooError: as `zoo.convert.verify.verify`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    parser = argparse.ArgumentParser(
        prog="zoo verify",
        description="Run a checkpoint here and in transformers, in float32, and compare what comes "
        "out of every layer. Needs torch and transformers.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a checkpoint folder, a converted one, or organisation/name[@revision]",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="T",
        help="largest error that agrees, relative to the largest value (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    args = parser.parse_args(argv)

    from zoo.convert.verify import verify  # after the flags: JAX and torch take long to import

    report = verify(args.source)
    agrees = report.worst <= args.tolerance
    if args.json:
        facts = {**asdict(report), "worst": report.worst, "tolerance": args.tolerance}
        print(json.dumps({**facts, "agrees": agrees}, indent=2))
        return 0 if agrees else 1
    width = max(len(line.name) for line in report.lines)
    for line in report.lines:
        print(f"{line.name:<{width}}  {line.error:.1e}  of {line.scale:.3g}")
    verdict = "agrees with" if agrees else "DIFFERS from"
    print(f"{verdict} {report.original}: largest relative error {report.worst:.1e}")
    return 0 if agrees else 1
