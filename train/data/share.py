"""Which rows of every batch a process reads."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from zoo.models.core.errors import UsageError


class Share(NamedTuple):
    """The rows of a batch that one process needs. The shares of a job cut each batch into parts of
    equal size; processes whose devices work on the same rows have the same share.

    Attributes:
      index, count: which of how many shares this is.
      rows: the places of its rows in the batch, ascending.
    """

    index: int
    count: int
    rows: tuple[int, ...]


def share_of(process: int, rows: Sequence[Collection[int]]) -> Share:
    """The share of one of several processes.

    Args:
      process: which one.
      rows: the rows that the devices of each process work on.

    Raises:
      UsageError: some processes have rows in common, but not all of them.
    """
    each = [tuple(sorted(set(own))) for own in rows]
    shares = sorted(set(each))
    if sum(map(len, shares)) > len(set().union(*shares)) or len(set(map(len, shares))) > 1:
        raise UsageError(
            "the devices of a process must work on the same examples as those of another process, "
            "or on none of them: choose sizes of the mesh that divide the devices of a process, or "
            "are multiples of their number"
        )
    return Share(shares.index(each[process]), len(shares), each[process])
