"""How much memory a cache takes of the machine: what the system says of this process."""

from __future__ import annotations

from pathlib import Path

from onnx_export.running import Model, Session
from onnx_export.running.buffers import filled

__all__ = ["resident_bytes", "resident_cache"]

# Unlike statm, which Linux keeps by processor and adds up now and then, it is exact.
_ROLLUP = Path("/proc/self/smaps_rollup")


def resident_bytes() -> int | None:
    """Return the bytes of this process that are in memory; None where the system does not tell.

    Linux tells.

    Examples
    --------
    >>> before = resident_bytes()
    >>> held = b"1" * 10_000_000
    >>> before is None or 9_000_000 < resident_bytes() - before < 11_000_000
    True
    """
    try:
        lines = _ROLLUP.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("Rss:")]
    return 1024 * int(kilobytes)


def resident_cache(model: Model, tokens: int) -> int | None:
    """Return by how much this process grows when a cache is made, and so many tokens written to it.

    The model is not run: what tokens fill of each tensor is written. Two caches are made, and the
    second is measured, as the first may be put where memory was left over.

    Parameters
    ----------
    model : Model
        Its cache has tensors of fixed size only.
    tokens : int
        Also the capacity.

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
    >>> grown = resident_cache(Model(tiny_onnx(QuantizedAttention(scheme, scheme))), 512)
    >>> grown is None or 0 <= grown < 1_000_000
    True
    """
    first = _written(model, tokens)
    before = resident_bytes()
    second = _written(model, tokens)
    after = resident_bytes()
    del first, second  # held until here
    return None if before is None or after is None else after - before


def _written(model: Model, tokens: int) -> Session:
    session = Session(model, capacity=tokens)
    arrays = session.tensors()
    for tensor in model.layout.tensors:
        arrays[tensor.past][0][filled(model.layout, tensor, tokens)] = 1
    return session
