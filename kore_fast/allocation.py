"""The C library's allocator, told to keep what is freed: a training step asks for the same large buffers again."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Stop glibc from giving large buffers back to the system after every use; True where that was possible.

    By default each large buffer is mapped anew and every page of it cleared at first touch. In return the process does
    not shrink between peaks, and where sizes change from step to step the heap grows holes: 12 GB after 120 steps of
    full fine-tuning that need 5. `release_freed_memory` after a step gives the holes back.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_TOP_PAD, 256 << 20))


def release_freed_memory() -> None:
    """Give what is free inside the heap back to the system once; the pages are cleared anew when next used."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
