"""The nodes that stand for one attention: nsq.Attention, and what brings tensors to its layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.extras import extra
from nsq_ref.feedback import Feedback
from nsq_ref.scheme import KeyValueSchemes
from onnx_export.operators.attention_models import attention_node, feedback_tensors
from onnx_export.operators.cache_layout import CacheTensor
from onnx_export.operators.nodes import Nodes
from onnx_export.rewrite.found import Bias, Found, Tokens
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.sizes import NEW_LENGTHS, PAST_LENGTHS, Sizes

with extra("rewrite", __name__):
    import onnx
    import onnx_ir as ir

__all__ = ["Attentions"]

BY_TOKEN = {"BSND": None, "BNSD": (0, 2, 1, 3), "BNDS": (0, 3, 1, 2)}  # to batch, token, head


class Attentions:
    """Makes the nodes of one layer after the other, in the order of the graph.

    What several layers have in common (lengths, positions, a mask) is made by the first of them.
    Feedback of keys becomes initializers, of which the nodes read.

    Parameters
    ----------
    graph : Graph
    sizes : Sizes
    prefix : str
        With which no name of the model begins.
    row_lengths : bool
        Take lengths that the model counts as inputs instead.

    Attributes
    ----------
    initializers : list of onnx.TensorProto
        That the nodes read and the model does not have yet.
    """

    def __init__(self, graph: Graph, sizes: Sizes, prefix: str, *, row_lengths: bool) -> None:
        self._graph = graph
        self._sizes = sizes
        self._prefix = prefix
        self._row_lengths = row_lengths
        self._made: dict[tuple[object, ...], Any] = {}
        self.initializers: list[onnx.TensorProto] = []

    def __call__(
        self,
        found: Found,
        layer: int,
        schemes: KeyValueSchemes,
        tensors: tuple[CacheTensor, ...],
        feedback: Feedback | None = None,
    ) -> list[onnx.NodeProto]:
        """Return the nodes of a layer; the output has the name that it had."""
        add = Nodes(f"{self._prefix}{layer}_")
        given = {"query": self._by_token(add, found.query)}
        if found.key is not None and found.value is not None:
            given["key"] = self._by_token(add, found.key)
            given["value"] = self._by_token(add, found.value)
        self._project(add, found, given, f"{self._prefix}{layer}_")
        given["past_lengths"], new = self._lengths(add, found)
        if new is not None:
            given["new_lengths"] = new
        if found.rotary is not None:
            given["cos"], given["sin"] = found.rotary.cos.name or "", found.rotary.sin.name or ""
            if (positions := self._positions(add, found)) is not None:
                given["position_ids"] = positions
        if (bias := self._bias(add, found)) is not None:
            given["attention_bias"] = bias
        if found.head_sink is not None:
            name = found.head_sink.name or ""
            one_axis = self._graph.rank(found.head_sink) == 1
            given["head_sink"] = name if one_axis else add("Reshape", name, [-1])
        if feedback is not None:
            made_once = feedback_tensors(feedback, f"{self._prefix}{layer}_")
            given |= {name: tensor.name for name, tensor in made_once.items()}
            self.initializers += made_once.values()

        node = attention_node(
            *schemes,
            heads=found.heads,
            kv_heads=found.kv_heads,
            inputs=given.keys() - {"query", "past_lengths"},
            scale=found.scale,
            causal=found.causal,
            softcap=found.softcap,
            sliding_window=found.sliding_window,
            rotary_interleaved=found.rotary is not None and found.rotary.interleaved,
            smooth_softmax=found.smooth_softmax,
            buffers=any(tensor.is_buffer for tensor in tensors),
        )
        node.name = f"{self._prefix}attention_{layer}"
        for tensor in tensors:
            given[f"past_{tensor.part}"] = tensor.past
        made = {f"present_{tensor.part}": tensor.present for tensor in tensors}
        made["present_lengths"] = f"{self._prefix}{layer}_present_lengths"
        direct = found.output.layout == "BSH"
        made["output"] = self._name(found) if direct else f"{self._prefix}{layer}_output"
        node.input[:] = [given[name] if name else "" for name in node.input]
        node.output[:] = [made[name] if name else "" for name in node.output]
        add.nodes.append(node)
        if not direct:
            self._from_token(add, made["output"], found)
        return add.nodes

    def _name(self, found: Found) -> str:
        return found.output.value.name or ""

    def _once(self, key: tuple[object, ...], make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    # --- layouts ---------------------------------------------------------------------------------

    def _by_token(self, add: Nodes, tokens: Tokens) -> str:
        """Return [batch, token, heads * channels]."""
        name = tokens.value.name or ""
        if tokens.layout == "BSH":
            return name
        if (order := BY_TOKEN[tokens.layout]) is not None:
            name = add("Transpose", name, perm=order)
        return add("Reshape", name, [0, 0, -1])

    def _from_token(self, add: Nodes, result: str, found: Found) -> None:
        """Bring [batch, token, heads * channels] into the layout that the output had."""
        layout, name = found.output.layout, self._name(found)
        sizes = [0, 0, found.heads, found.value_head_dim]
        if layout == "BSND":
            add("Reshape", result, sizes, name=name)
            return
        by_head = add("Reshape", result, sizes)
        # The inverse of what brings it to tokens.
        perm = (0, 2, 1, 3) if layout == "BNSD" else (0, 2, 3, 1)
        add("Transpose", by_head, perm=perm, name=name)

    def _project(self, add: Nodes, found: Found, given: dict[str, str], prefix: str) -> None:
        """Add the bias of the projections, and normalize queries and keys."""
        bias = found.projection_bias
        norms = {"query": found.query_norm, "key": found.key_norm}
        if bias is None and not any(norms.values()):
            return
        sizes = [found.heads * found.head_dim]
        sizes += [found.kv_heads * size for size in (found.head_dim, found.value_head_dim)]
        sides = ("query", "key", "value")
        if found.key is None:
            packed, names = given["query"], {side: f"{prefix}{side}" for side in sides}
            add.several("Split", [packed, sizes], list(names.values()), axis=2)
            given |= names
        if bias is not None:
            parts = {side: f"{prefix}{side}_bias" for side in sides}
            add.several("Split", [bias.name, sizes], list(parts.values()), axis=0)
            given |= {side: add("Add", given[side], part) for side, part in parts.items()}
        for side, norm in norms.items():
            if norm is not None:
                heads = add("Reshape", given[side], [0, 0, -1, found.head_dim])
                # Of onnxruntime, as the attention that is replaced.
                made = add(
                    "SimplifiedLayerNormalization", heads, norm.weight.name or "",
                    axis=-1, epsilon=norm.epsilon, stash_type=1,
                )  # fmt: skip
                given[side] = add("Reshape", made, [0, 0, -1])

    # --- lengths and positions -------------------------------------------------------------------

    def _tokens(self, add: Nodes, found: Found) -> str:
        return self._sizes.tokens(found.query.value, found.query.layout, add)

    def _lengths(self, add: Nodes, found: Found) -> tuple[str, str | None]:
        """Return the lengths of the past, and of the new tokens if not all are real."""
        lengths = found.lengths
        if lengths.of_extent:
            return self._sizes.past_lengths(), None
        if self._row_lengths and lengths.past is None:
            self._sizes.needed |= {PAST_LENGTHS, NEW_LENGTHS}
            return PAST_LENGTHS, NEW_LENGTHS
        past, new = (
            None if one is None else self._counts(add, one) for one in (lengths.past, lengths.new)
        )
        if past is not None and (new is not None or lengths.total is None):
            return past, new
        if lengths.total is None:
            raise ValueError("new_lengths alone tell nothing of the past")
        total = self._counts(add, lengths.total)
        sequence = "" if past or new else self._tokens(add, found)

        def make() -> tuple[str, str]:
            all_of = add("Add", total, [lengths.total_offset]) if lengths.total_offset else total
            if past is not None:
                return past, add("Sub", all_of, past)
            real = add("Min", all_of, sequence) if new is None else new
            return add("Sub", all_of, real), real

        result: tuple[str, str] = self._once(("lengths", lengths, sequence), make)
        return result

    def _counts(self, add: Nodes, value: ir.Value) -> str:
        """Return lengths as int64 [batch]."""

        def make() -> str:
            name = value.name or ""
            if self._graph.dtype(value) != "int64":
                name = add.cast(name, "int64")
            return name if self._graph.rank(value) == 1 else add("Reshape", name, [-1])

        result: str = self._once(("counts", value), make)
        return result

    def _positions(self, add: Nodes, found: Found) -> str | None:
        rotary = found.rotary
        if rotary is None or rotary.position_ids is None:
            return None
        given = rotary.position_ids.name or ""
        if rotary.first_prompt is None:
            return given
        first_prompt, tokens = rotary.first_prompt, self._tokens(add, found)

        def make() -> str:
            first = add.cast(first_prompt.name or "", "int64")
            start = add("Slice", add("Reshape", given, [-1]), [0], [1])
            counted = add("Add", add("Range", 0, add("Squeeze", tokens), 1), start)
            return add("Where", add("Equal", first, tokens), counted, given)

        key = ("positions", rotary.position_ids, first_prompt, tokens)
        result: str = self._once(key, make)
        return result

    # --- masks -----------------------------------------------------------------------------------

    def _bias(self, add: Nodes, found: Found) -> str | None:
        """Return bias and mask as one float tensor of four axes, with a row for every query."""
        biases = [Bias(found.bias)] if found.bias is not None else []
        biases += found.added
        masks = [one for one in (found.mask, found.padding) if one is not None]
        given = [*(one.value for one in biases), *masks]
        if not given:
            return None
        tokens = self._tokens(add, found)
        kind = np.dtype(found.dtype).type

        def make() -> str:
            bias: Any = None
            for one in biases:
                part = self._four_axes(add, one.value, found.heads if one.flat else None)
                part = part if one.factor == 1 else add("Mul", part, kind(one.factor))
                bias = part if bias is None else add("Add", bias, part)
            bias = kind(0) if bias is None else bias
            if found.mask is not None:
                seen = [bias, kind(-np.inf)]
                mask = self._four_axes(add, found.mask)
                bias = add("Where", mask, *(reversed(seen) if found.mask_hides else seen))
            if found.padding is not None:
                bias = add("Where", self._seen(add, found.padding), bias, kind(-np.inf))
            if any(self._sizes.are_tokens(one, (self._graph.rank(one) or 0) - 2) for one in given):
                return str(bias)
            return add("Expand", bias, add("Concat", [1, 1], tokens, [1], axis=0))

        key = ("bias", *biases, found.mask, found.mask_hides, found.padding, found.dtype, tokens)
        result: str = self._once(key, make)
        return result

    def _seen(self, add: Nodes, padding: ir.Value) -> str:
        """Return a mask of padding as bool of four axes, heads between."""
        axes = [1] if self._graph.rank(padding) == 3 else [1, 2]
        return add("Unsqueeze", add.cast(padding.name or "", "bool"), axes)

    def _four_axes(self, add: Nodes, value: ir.Value, heads: int | None = None) -> str:
        """Return a value of four axes; with heads, its first of three is batch and heads."""
        name, rank = value.name or "", self._graph.rank(value)
        if heads is not None:
            rest = add("Shape", name, start=1)
            return add("Reshape", name, add("Concat", [-1, heads], rest, axis=0))
        if rank is None:
            raise ValueError(f"the mask {name} has no known rank")
        return name if rank == 4 else add("Unsqueeze", name, list(range(4 - rank)))
