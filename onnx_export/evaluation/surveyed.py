"""What the rewriter finds in an exported decoder: its attentions, and where queries are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.operators.cache_layout import layer_in_name
from onnx_export.rewrite import files
from onnx_export.rewrite.found import Cache, Found
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.patterns import PATTERNS
from onnx_export.rewrite.survey import name_of, survey

with extra("onnx", __name__):
    import onnx

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Attentions", "attentions"]

Array = NDArray[Any]


class Attentions(NamedTuple):
    """The attentions of a model, and the model in which they are not hidden in functions.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    proto : onnx.ModelProto
    found : list of Found
        Those that are understood.
    refused : str
        Why one is not; empty where all are.
    """

    proto: onnx.ModelProto
    found: list[Found]
    refused: str

    def without_queries(self) -> str:
        """Return why queries as they meet the keys are not had; empty where they are."""
        for one in self.found:
            within = (one.query_norm, one.projection_bias)
            if not self.refused and within != (None, None):
                where = _where(one.node, (one.key_cache, one.value_cache))
                return f"{where}: queries are normalized, or get a bias, within the attention"
        return self.refused

    def computed_tables(self, one: Found) -> tuple[str, ...]:
        """Return what of the angles by which an attention rotates the model computes."""
        tables = () if one.rotary is None else (one.rotary.cos, one.rotary.sin)
        return tuple(str(table.name) for table in tables if table.name not in self._tables())

    def queries(
        self, one: Found, given: Array, folder: Path, computed: Mapping[str, Array]
    ) -> NDArray[np.float32]:
        """Return queries as they meet the keys, rotated if the attention does it.

        ``computed`` are the values of `computed_tables`.
        """
        tables = self._tables()
        if one.key is None:  # packed, the queries first
            given = given[..., : one.heads * one.head_dim]
        queries = in_heads(given, one.query.layout, one.heads)
        if one.rotary is None:
            return queries
        cosine, sine = (
            (
                onnx.numpy_helper.to_array(tables[str(table.name)], str(folder))
                if table.name in tables
                else computed[str(table.name)]
            )[: queries.shape[2]]
            for table in (one.rotary.cos, one.rotary.sin)
        )
        return _rotated(queries, cosine, sine, one.rotary.interleaved)

    def _tables(self) -> Mapping[str, onnx.TensorProto]:
        return {one.name: one for one in self.proto.graph.initializer}


def attentions(path: Path) -> Attentions:
    """Return the attentions with a cache of an exported decoder.

    Raises
    ------
    OSError
        Where a file is missing or cannot be read.
    ValueError
        For what is no ONNX model, or one that is cut off.
    """
    proto = files.read(path)
    proto = files.inlined(proto, {one for pattern in PATTERNS for one in pattern.ANCHORS})
    found, refused = [], ""
    for one in survey(Graph(files.as_ir(proto, path.parent))):
        if isinstance(one, Found):
            found.append(one)
        else:
            where = _where(one.node, one.caches)
            refused = refused or f"{where} is not understood: {one.reason}"
    return Attentions(proto, found, refused)


def in_heads(array: Array, layout: str, heads: int) -> NDArray[np.float32]:
    """Bring a tensor of any layout into float32 ``[batch, heads, tokens, head_dim]``."""
    if layout == "BSH":
        array, layout = array.reshape(*array.shape[:2], heads, -1), "BSND"
    order = [layout.index(axis) for axis in "BNSD"]
    moved: NDArray[np.float32] = np.ascontiguousarray(array.transpose(order), np.float32)
    return moved


def _where(node: ir.Node, caches: Iterable[Cache]) -> str:
    """Return what a user finds an attention by: its layer, if its caches tell, and its name."""
    layers = {layer_in_name(one.past.name or "") for one in caches} - {None}
    layer = f"layer {layers.pop()}, " if len(layers) == 1 else ""
    return f"{layer}attention {name_of(node)!r}"


def _rotated(
    x: NDArray[np.float32], cosine: Array, sine: Array, interleaved: bool
) -> NDArray[np.float32]:
    """Turn the first channels by the angles of positions that count from 0."""
    half = cosine.shape[1]
    parts = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if not interleaved:
        parts = (slice(0, half), slice(half, 2 * half))
    first, second = (x[..., part] for part in parts)
    turned: NDArray[np.float32] = x.copy()
    turned[..., parts[0]] = first * cosine - second * sine
    turned[..., parts[1]] = second * cosine + first * sine
    return turned
