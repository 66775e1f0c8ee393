"""The frames in which the kit and a port talk: named arrays, little-endian, one after the other.

`docs/porting.md` describes the format for ports in other languages; this is its Python side.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nsq_ref.scheme import Scheme

__all__ = [
    "DTYPES",
    "Frame",
    "FrameError",
    "read_frame",
    "scheme_array",
    "scheme_of",
    "write_frame",
]

Array = npt.NDArray[Any]
Frame = dict[str, Array]

MAGIC = b"NSQ1"
MOST_ARRAYS = 64
MOST_AXES = 4
MOST_BYTES = 1 << 30  # of one frame: more is taken for garbage, not for a request of memory
_COUNT = struct.Struct("<I")
_HEADER = struct.Struct("<32sII4I")  # name, dtype, axes, shape; 56 bytes

# The number of a dtype, in frames, in schemes and in nsq.h.
DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int32)
)

# The order of a scheme's numbers, and of the words that some of them stand for.
_WORDS: dict[str, tuple[Any, ...]] = {
    "bits": (),
    "separate_norm": (False, True),
    "axis": ("channel", "token"),
    "symmetric": (False, True),
    "scale_rule": ("range", "search"),
    "magnitude": ("norm", "gain", "lsq"),
    "block_size": (),
    "sink_tokens": (),
    "outlier_channels": (),
    "scale_dtype": ("float32", "float16", "bfloat16"),
    "norm_dtype": ("float32", "float16", "bfloat16"),
}


class FrameError(ValueError):
    """What was read is not a frame."""


class StreamEndedError(FrameError):
    """What was read is the beginning of a frame: the stream ended within it."""


def write_frame(stream: BinaryIO, frame: Mapping[str, Array]) -> None:
    """Write named arrays as one frame.

    Parameters
    ----------
    stream : binary file
    frame : mapping of str to array
        float32, float16, bfloat16, uint8 or int32, of at most four axes.

    Raises
    ------
    ValueError
        For a name or an array that a frame cannot hold.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> stream = io.BytesIO()
    >>> write_frame(stream, {"x": np.float32([[1, 2]])})
    >>> len(stream.getvalue())
    72
    """
    chunks = [MAGIC, _COUNT.pack(len(frame))]
    if len(frame) > MOST_ARRAYS:
        raise ValueError(f"{len(frame)} arrays are more than the {MOST_ARRAYS} that a frame holds")
    for name, array in frame.items():
        encoded = name.encode("ascii")
        if not 0 < len(encoded) <= 32 or array.ndim > MOST_AXES or array.dtype not in DTYPES:
            raise ValueError(
                f"array {name!r}, {array.dtype} of shape {list(array.shape)}, does not fit a frame"
            )
        shape = (*array.shape, *[1] * (MOST_AXES - array.ndim))
        chunks.append(_HEADER.pack(encoded, DTYPES.index(array.dtype), array.ndim, *shape))
        chunks.append(np.ascontiguousarray(array).tobytes())
    stream.write(b"".join(chunks))
    stream.flush()


def read_frame(stream: BinaryIO) -> Frame | None:
    """Read one frame.

    Parameters
    ----------
    stream : binary file

    Returns
    -------
    dict of str to array, or None
        None at the end of the stream.

    Raises
    ------
    FrameError
        For anything but a whole frame.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> stream = io.BytesIO()
    >>> write_frame(stream, {"x": np.float32([[1, 2]])})
    >>> _ = stream.seek(0)
    >>> read_frame(stream), read_frame(stream)
    ({'x': array([[1., 2.]], dtype=float32)}, None)
    """
    start = stream.read(len(MAGIC))
    if not start:
        return None
    if start != MAGIC:
        text = start + (stream.read1(60) if hasattr(stream, "read1") else b"")
        raise FrameError(f"a frame begins with {MAGIC!r}; read {text!r}")
    (count,) = _COUNT.unpack(_exactly(stream, _COUNT.size))
    if count > MOST_ARRAYS:
        raise FrameError(f"the frame claims {count} arrays; at most {MOST_ARRAYS} are allowed")
    frame: Frame = {}
    taken = 0
    for _ in range(count):
        encoded, kind, axes, *dims = _HEADER.unpack(_exactly(stream, _HEADER.size))
        stripped = encoded.rstrip(b"\0")
        if not stripped.isascii() or not stripped.decode("ascii").isprintable() or not stripped:
            raise FrameError(f"the name of array {len(frame)} is {encoded!r}, not ASCII text")
        name = stripped.decode("ascii")
        if name in frame:
            raise FrameError(f"array {name!r} comes twice")
        if kind >= len(DTYPES) or axes > MOST_AXES:
            raise FrameError(
                f"array {name!r} has dtype {kind} and {axes} axes; dtypes are 0 to "
                f"{len(DTYPES) - 1}, and at most {MOST_AXES} axes are allowed"
            )
        shape = tuple(dims[:axes])
        size = math.prod(shape) * DTYPES[kind].itemsize
        taken += size
        if taken > MOST_BYTES:
            raise FrameError(
                f"with array {name!r} of shape {list(shape)} the frame would take {taken} bytes; "
                f"at most {MOST_BYTES} are allowed"
            )
        data = bytearray(_exactly(stream, size))
        frame[name] = np.frombuffer(data, DTYPES[kind]).reshape(shape)
    return frame


def scheme_array(scheme: Scheme) -> npt.NDArray[np.int32]:
    """Return a scheme as the eleven numbers that frames and ``nsq.h`` carry.

    Examples
    --------
    >>> scheme_array(Scheme(bits=3, magnitude="lsq", block_size=128)).tolist()
    [3, 1, 0, 1, 0, 2, 128, 0, 0, 1, 1]
    """
    numbers = []
    for name, value in scheme.to_dict().items():
        words = _WORDS[name]
        numbers.append(words.index(value) if words else value or 0)
    return np.array(numbers, np.int32)


def scheme_of(numbers: Array) -> Scheme:
    """Return the scheme of eleven numbers; the inverse of `scheme_array`.

    Raises
    ------
    ValueError
        For numbers that are no scheme.

    Examples
    --------
    >>> scheme_of(scheme_array(Scheme(bits=3))) == Scheme(bits=3)
    True
    """
    if numbers.shape != (len(_WORDS),):
        raise ValueError(f"a scheme has {len(_WORDS)} numbers, got shape {list(numbers.shape)}")
    fields: dict[str, Any] = {}
    for (name, words), number in zip(_WORDS.items(), numbers.tolist(), strict=True):
        if words and not 0 <= number < len(words):
            raise ValueError(f"{name} is {number} in the scheme; it is 0 to {len(words) - 1}")
        fields[name] = words[number] if words else number
    fields["block_size"] = fields["block_size"] or None
    return Scheme(**fields)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise StreamEndedError(f"the stream ended {size - len(data)} bytes before the frame did")
    return data
