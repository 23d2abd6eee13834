"""`zoo bench`: comparisons of one model with itself under several methods."""

from collections.abc import Sequence

from zoo.models.core.errors import UsageError


def main(argv: Sequence[str]) -> int:
    """Run `zoo bench tokens ...`; there is nothing else yet.

    Raises:
      UsageError: another word, or as `zoo.train.bench.tokens.main`.
    """
    if argv and argv[0] == "tokens":
        from zoo.train.bench import tokens

        return tokens.main(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print("usage: zoo bench tokens --model M [--methods all] [--keep 192,128,64] ...")
        return 0
    raise UsageError(f"zoo bench {' '.join(argv)}: want zoo bench tokens --model M ...")
