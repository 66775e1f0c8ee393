"""How much memory a cache takes of the machine: what the system says of this process."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from onnx_export.running import Session

__all__ = ["resident_bytes", "resident_cache"]

# Unlike statm, which Linux keeps by processor and adds up now and then, it is exact.
_ROLLUP = Path("/proc/self/smaps_rollup")
_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT = 63  # the bit of a page that is in memory


def resident_bytes() -> int | None:
    """Return the bytes of this process that are in memory; None where the system does not tell.

    Linux tells.

    Examples
    --------
    >>> taken = resident_bytes()
    >>> taken is None or taken > 1_000_000
    True
    """
    try:
        lines = _ROLLUP.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("Rss:")]
    return 1024 * int(kilobytes)


def resident_cache(session: Session) -> int | None:
    """Return the bytes in memory of a cache, of whole pages that its tensors lie in.

    What the process grows by would not tell: the allocator gives what was freed before again.

    Parameters
    ----------
    session : Session
        As `onnx_export.running.Session.pretend` fills it, or what it reads.

    Returns
    -------
    int or None
        Bytes; None where the system does not tell.

    Examples
    --------
    >>> from onnx_export.models.attention_forms import QuantizedAttention
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> from nsq_ref import Scheme
    >>> scheme = Scheme.named("streaming4")
    >>> session = Session(tiny_onnx(QuantizedAttention(scheme, scheme)))
    >>> session.pretend(512)
    >>> taken = resident_cache(session)
    >>> taken is None or 30_000 < taken < 300_000
    True
    """
    pages: set[int] = set()
    for array in session.tensors().values():
        start = array.ctypes.data
        pages.update(range(start // mmap.PAGESIZE, -(-(start + array.nbytes) // mmap.PAGESIZE)))
    if not pages:
        return 0
    try:
        with _PAGEMAP.open("rb", buffering=0) as entries:
            present = 0
            for first, stop in _runs(sorted(pages)):
                entries.seek(8 * first)
                read = np.frombuffer(entries.read(8 * (stop - first)), np.uint64)
                present += int((read >> np.uint64(_PRESENT)).sum())
    except OSError:
        return None
    return present * mmap.PAGESIZE


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return where consecutive numbers start and stop."""
    found = np.array(numbers)
    cuts = np.flatnonzero(np.diff(found) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(found, cuts)]
