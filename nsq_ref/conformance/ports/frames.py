"""The frames in which the kit and a port talk: named arrays, little-endian, one after the other.

`docs/porting.md` describes the format for ports in other languages; this is its Python side.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import BinaryIO, Protocol

import numpy as np

from nsq_ref.conformance.operations import DTYPES, scheme_array, scheme_of
from nsq_ref.dtypes import Array

__all__ = [
    "DTYPES", "Frame", "FrameError", "Frames", "read_frame", "scheme_array", "scheme_of",
    "write_frame",
]  # fmt: skip

Frame = dict[str, Array]

MAGIC = b"NSQ1"
MOST_ARRAYS = 64
MOST_AXES = 4
MOST_BYTES = 1 << 30  # of one frame: more is taken for garbage, not for a request of memory
MOST_BETWEEN = 1 << 20  # bytes between two frames: who writes more writes no frames
CHUNK_BYTES = 1 << 20  # memory is asked for as data come, not as they are announced
_COUNT = struct.Struct("<I")
_HEADER = struct.Struct("<32sII4I")  # name, dtype, axes, shape; 56 bytes


class FrameError(ValueError):
    """What was read is not a frame."""


class StreamEndedError(FrameError):
    """What was read is the beginning of a frame: the stream ended within it."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...  # pragma: no cover


def write_frame(stream: BinaryIO, frame: Mapping[str, Array]) -> None:
    """Write named arrays as one frame.

    They are of `DTYPES` and have at most four axes; ValueError for what a frame cannot hold.

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


def read_frame(stream: _Readable) -> Frame | None:
    """Read one frame; None at the end of the stream, FrameError for anything but a whole frame.

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
        behind = _read1(stream, 60)
        raise FrameError(f"a frame begins with {MAGIC!r}; read {start + behind!r}")
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
        data = _exactly(stream, size)
        try:
            frame[name] = np.frombuffer(data, DTYPES[kind]).reshape(shape)
        except ValueError:  # no elements, and axes that NumPy cannot hold
            raise FrameError(
                f"array {name!r} has the shape {list(shape)}, which no array has"
            ) from None
    return frame


class Frames:
    """The frames of a stream, found again behind whatever else is written between them.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> stream = io.BytesIO()
    >>> _ = stream.write(b"ready!")
    >>> write_frame(stream, {"x": np.float32([[1, 2]])})
    >>> _ = stream.seek(0)
    >>> frames = Frames(stream)
    >>> frames.read_frame()
    Traceback (most recent call last):
    nsq_ref.conformance.ports.frames.FrameError: ...
    >>> frames.skip()
    True
    >>> frames.read_frame()
    {'x': array([[1., 2.]], dtype=float32)}
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._waiting = b""  # bytes that were read, and are to be read once more
        self._taken: list[bytes] = []  # of the frame that is being read

    def read_frame(self) -> Frame | None:
        """Read one frame, as the function `read_frame` does."""
        self._taken = []
        return read_frame(self)

    def skip(self) -> bool:
        """After a `FrameError`, go on to what looks like the next frame; False if there is none."""
        text = b"".join(self._taken)[1:] + self._waiting
        for _ in range(MOST_BETWEEN // CHUNK_BYTES + 1):
            found = text.find(MAGIC)
            if found >= 0:
                self._waiting = text[found:]
                return True
            if not (more := _read1(self._stream, CHUNK_BYTES)):
                break
            text = text[1 - len(MAGIC) :] + more
        self._waiting = b""
        return False

    def read(self, size: int, /) -> bytes:
        """Read so many bytes, or what there is until the end."""
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        if len(data) < size:
            data += self._stream.read(size - len(data))
        self._taken.append(data)
        return data

    def read1(self, size: int, /) -> bytes:
        """Read what there is, at least a byte unless the stream has ended."""
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        if not data:
            data = _read1(self._stream, size)
        self._taken.append(data)
        return data


def _read1(stream: _Readable, size: int) -> bytes:
    """Read what there is: to read more would be to wait for it."""
    data: bytes = getattr(stream, "read1", stream.read)(size)
    return data


def _exactly(stream: _Readable, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        chunk = stream.read(min(size - len(data), CHUNK_BYTES))
        if not chunk:
            raise StreamEndedError(
                f"the stream ended {size - len(data)} bytes before the frame did"
            )
        data += chunk
    return data
