"""The process that a run lives in."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENAS = -1, -3, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is allocated next.

    A step on a CPU allocates and frees the same large buffers every time. By default glibc gives
    each of them back to the system, which then has to clear its pages anew: a sixth of the time
    of a small step, and of a larger one a quarter. The process grows to its peak and stays there.
    All threads share one pool, because the others hold nothing large: threads that have allocated
    before keep theirs, so call this early. Elsewhere than on Linux with glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENAS, 1)
        mallopt(_MMAP_THRESHOLD, _NEVER)
        mallopt(_TRIM_THRESHOLD, _NEVER)
