"""Lengths that programs are compiled for: rounded up, so that they stay few."""

_SHORTEST = 16


def bucket(n: int) -> int:
    """The least number >= n of the form (4, 5, 6 or 7) x a power of two; n itself up to 8.

    At most a quarter is added, and only four sizes occur between a number and its double.
    """
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


def text_length(n: int) -> int:
    """`bucket` for texts, which below 16 tokens share one length."""
    return bucket(max(_SHORTEST, n))
