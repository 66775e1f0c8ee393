"""Strict reading of GGUF files: every length is checked against the file before it is used.

The reader of the ``gguf`` package trusts the lengths that it finds, so a damaged file can make it
loop for ever. This one reads the same format with bounds; dequantization is left to ``gguf``.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from nsq_ref.files import kinds

with extra("onnx", __name__):
    import gguf

_SCALARS = {
    gguf.GGUFValueType.UINT8: "<u1",
    gguf.GGUFValueType.INT8: "<i1",
    gguf.GGUFValueType.UINT16: "<u2",
    gguf.GGUFValueType.INT16: "<i2",
    gguf.GGUFValueType.UINT32: "<u4",
    gguf.GGUFValueType.INT32: "<i4",
    gguf.GGUFValueType.FLOAT32: "<f4",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "<u8",
    gguf.GGUFValueType.INT64: "<i8",
    gguf.GGUFValueType.FLOAT64: "<f8",
}

# GGML's own limit on the number of dimensions of a tensor.
_MAX_DIMENSIONS = 4

# Name, shape, type, and offset from where the tensors begin.
_Header = tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a GGUF file, for any thread."""

    shape: tuple[int, ...]  # row-major: a linear layer's weight is (out_features, in_features)
    tensor_type: gguf.GGMLQuantizationType  # how the elements are stored
    start: int  # bytes of the file
    stop: int


class GGUFFile:
    """Metadata and tensors of a GGUF file, versions 2 and 3, little-endian.

    Once made it is only read, so that threads may share one.

    Parameters
    ----------
    path : str or os.PathLike
        The file. It is mapped into memory, not read at once.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    metadata : dict
        Key to ``int``, ``float``, ``bool``, ``str``, ``list[str]`` or one-dimensional array.
    tensors : dict of str to TensorInfo
        The tensors by name.

    Raises
    ------
    ValueError
        If the file is not GGUF, is truncated or contradicts itself, or is one part of a model that
        was split into several files.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import gguf, numpy as np
    >>> path = Path(tempfile.mkdtemp()) / "tiny.gguf"
    >>> writer = gguf.GGUFWriter(path, "llama")
    >>> writer.add_tensor("output.weight", np.ones((3, 2), np.float32))
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file()
    >>> writer.close()
    >>> file = GGUFFile(path)
    >>> file.metadata["general.architecture"], file.tensors["output.weight"].shape
    ('llama', (3, 2))
    >>> file.tensor("output.weight").sum()
    np.float32(6.0)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
        if size < 4:
            raise ValueError(f"{self.path}: {size} bytes is too short for a GGUF file")
        self._bytes: NDArray[np.uint8] = np.memmap(self.path, dtype=np.uint8, mode="r")
        self._view = self._bytes.data
        self._position = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()

    def value(self, key: str, default: Any = None) -> Any:
        """Return what `metadata` has under a key, or else the default.

        Raises
        ------
        ValueError
            If there is neither.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: key {key!r} is missing; convert the model again")
        return value

    def info(self, name: str) -> TensorInfo:
        """Return what `tensors` has under a name.

        Raises
        ------
        ValueError
            If there is no such tensor.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: tensor {name!r} is missing; convert the model again")
        return self.tensors[name]

    def tensor(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return one tensor, dequantized.

        Parameters
        ----------
        name : str
            Name of the tensor.
        rows : slice, optional
            Only these rows of a matrix.

        Returns
        -------
        numpy.ndarray
            float32, of the shape in `tensors`; it may be a read-only view of the file.

        Raises
        ------
        ValueError
            If there is no such tensor, its type cannot be dequantized, or an element is not finite.
        """
        info = self.info(name)
        raw, shape = self.raw(name), info.shape
        if rows is not None:
            raw = raw[rows]
            shape = (len(raw), *shape[1:])
        result = np.asarray(self._dequantized(name, raw), dtype=np.float32).reshape(shape)
        if not np.isfinite(result).all():
            raise self.not_finite(name)
        return result

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of one tensor, a read-only view of the file.

        Parameters
        ----------
        name : str
            Name of the tensor.

        Returns
        -------
        numpy.ndarray
            uint8 ``[rows, bytes of a row]``; a row is made of whole blocks.

        Raises
        ------
        ValueError
            If there is no such tensor.
        """
        info = self.info(name)
        return self._bytes[info.start : info.stop].reshape(math.prod(info.shape[:-1]), -1)

    def not_finite(self, name: str) -> ValueError:
        """Return the error of a tensor with an element that is not finite."""
        return ValueError(
            f"{self.path}: tensor {name!r} has elements that are not finite; the file is "
            "damaged, download or convert it again"
        )

    def require_types(self) -> None:
        """Refuse tensors whose type cannot be dequantized, before any tensor is read.

        Raises
        ------
        ValueError
            If there is one.
        """
        for name, info in {one.tensor_type: (n, one) for n, one in self.tensors.items()}.values():
            _, block_bytes = gguf.GGML_QUANT_SIZES[info.tensor_type]
            self._dequantized(name, np.zeros((1, block_bytes), np.uint8))

    def _dequantized(self, name: str, rows: NDArray[np.uint8]) -> NDArray[Any]:
        """Return rows of whole blocks as numbers, of which some may not be finite."""
        kind = self.tensors[name].tensor_type
        try:
            with np.errstate(all="ignore"):
                values: NDArray[Any] = gguf.dequantize(rows, kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name!r} is stored as {kind.name}, which "
                "gguf.dequantize does not support; convert the model to F32, F16, BF16 or Q8_0"
            ) from error
        return values

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: {what}; the file is truncated or damaged, download or convert it again"
        )

    def _take(self, count: int, what: str) -> int:
        """Advance by `count` bytes and return where they begin."""
        start = self._position
        if count > len(self._view) - start:
            raise self._damaged(
                f"{what} needs {count} bytes at offset {start}, but the file has {len(self._view)}"
            )
        self._position = start + count
        return start

    def _integer(self, layout: str, what: str) -> int:
        start = self._take(struct.calcsize(layout), what)
        return int(struct.unpack_from(layout, self._view, start)[0])

    def _string(self, what: str) -> str:
        length = self._integer("<Q", f"the length of {what}")
        start = self._take(length, what)
        try:
            return str(self._view[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8") from error

    def _value_type(self, what: str) -> gguf.GGUFValueType:
        number = self._integer("<I", f"the type of {what}")
        try:
            return gguf.GGUFValueType(number)
        except ValueError as error:
            raise self._damaged(f"{what} has the unknown type {number}") from error

    def _numbers(self, value_type: gguf.GGUFValueType, count: int, what: str) -> NDArray[Any]:
        dtype = np.dtype(_SCALARS[value_type])
        start = self._take(count * dtype.itemsize, what)
        numbers: NDArray[Any] = np.frombuffer(self._view, dtype, count, start).copy()
        return numbers

    def _value(self, key: str) -> Any:
        what = f"key {key!r}"
        value_type = self._value_type(what)
        if value_type == gguf.GGUFValueType.STRING:
            return self._string(what)
        if value_type != gguf.GGUFValueType.ARRAY:
            return self._numbers(value_type, 1, what)[0].item()
        item_type = self._value_type(f"the items of {what}")
        count = self._integer("<Q", f"the length of {what}")
        if item_type == gguf.GGUFValueType.ARRAY:
            raise ValueError(f"{self.path}: {what} is an array of arrays, which is not supported")
        if item_type == gguf.GGUFValueType.STRING:
            return [self._string(f"item {index} of {what}") for index in range(count)]
        return self._numbers(item_type, count, what)

    def _read_header(self) -> None:
        if bytes(self._view[:4]) != b"GGUF":
            raise ValueError(
                kinds.mistaken(self.path, kinds.GGUF)
                or f"{self.path}: not a GGUF file: it does not begin with 'GGUF'"
            )
        self._position = 4
        version = self._integer("<I", "the version")
        if version not in (2, 3):
            raise ValueError(
                f"{self.path}: GGUF version {version} is not supported; "
                "convert the model to a little-endian file of version 3"
            )
        tensor_count = self._integer("<Q", "the tensor count")
        key_count = self._integer("<Q", "the key count")
        for index in range(key_count):
            key = self._string(f"the name of key {index}")
            if key in self.metadata:
                raise self._damaged(f"key {key!r} appears twice")
            self.metadata[key] = self._value(key)
        self._require_whole()
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"key 'general.alignment' is {alignment!r}, not a power of two")
        headers = [self._tensor_header(index) for index in range(tensor_count)]
        self._place_tensors(headers, alignment)

    def _require_whole(self) -> None:
        """Refuse a part of a split model, in which tensors and most metadata are elsewhere."""
        number, count = (self.metadata.get(f"split.{key}") for key in ("no", "count"))
        if type(number) is not int or type(count) is not int or count < 2:
            return
        names = "FIRST-PART OUTPUT"
        if found := re.fullmatch(r"(.*)-\d{5}(-of-\d{5}\.gguf)", str(self.path)):
            names = f"{found[1]}-00001{found[2]} {found[1]}.gguf"
        raise ValueError(
            f"{self.path}: part {number + 1} of {count} of a split model; merge them first: "
            f"llama-gguf-split --merge {names}"
        )

    def _tensor_header(self, index: int) -> _Header:
        name = self._string(f"the name of tensor {index}")
        what = f"tensor {name!r}"
        dimensions = self._integer("<I", f"the dimension count of {what}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"{what} has {dimensions} dimensions")
        # GGUF lists the fastest dimension first.
        shape = tuple(self._integer("<Q", f"the shape of {what}") for _ in range(dimensions))[::-1]
        number = self._integer("<I", f"the type of {what}")
        offset = self._integer("<Q", f"the offset of {what}")
        try:
            tensor_type = gguf.GGMLQuantizationType(number)
        except ValueError as error:
            raise ValueError(
                f"{self.path}: {what} has the unknown GGML type {number}; update the gguf package"
            ) from error
        return name, shape, tensor_type, offset

    def _place_tensors(self, headers: Iterable[_Header], alignment: int) -> None:
        data_start = -(-self._position // alignment) * alignment
        for name, shape, tensor_type, offset in headers:
            if name in self.tensors:
                raise self._damaged(f"tensor {name!r} appears twice")
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
            if 0 in shape or shape[-1] % block_size:
                raise self._damaged(
                    f"tensor {name!r} of shape {shape} is not made of whole {tensor_type.name} "
                    f"blocks of {block_size}"
                )
            if offset % alignment:
                raise self._damaged(
                    f"tensor {name!r} begins at offset {offset}, not a multiple of {alignment}"
                )
            start = data_start + offset
            stop = start + math.prod(shape) // block_size * block_bytes
            if stop > len(self._view):
                raise self._damaged(
                    f"tensor {name!r} ends at byte {stop}, but the file has {len(self._view)}"
                )
            self.tensors[name] = TensorInfo(shape, tensor_type, start, stop)
