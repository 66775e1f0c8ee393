"""Rewriting a model: find the attentions, decide, replace, write.

Values are followed with onnx_ir; changed is the message itself, so that what is not touched is the
same in every byte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nsq_ref.arrays import as_integer
from nsq_ref.extras import extra
from nsq_ref.feedback import Feedback
from nsq_ref.files import atomic
from nsq_ref.policy import Policy, feedback_of_layers
from nsq_ref.scheme import KeyValueSchemes, Scheme, as_scheme
from onnx_export.custom_ops import library_path
from onnx_export.operators.cache_buffers import buffer_tensors
from onnx_export.operators.cache_layout import KEY, CacheLayout, CacheTensor, quantized_tensors
from onnx_export.operators.domain import check_nodes, functions
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.schema import DOMAIN, ELEMENTS, OPSET, VERSION
from onnx_export.rewrite import files, genai
from onnx_export.rewrite.found import Found, Refused
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.message import remove, replace, unsound, unused_prefix, value_info
from onnx_export.rewrite.nodes import Attentions
from onnx_export.rewrite.opset import NEWEST, raise_opset, require_raisable
from onnx_export.rewrite.patterns import PATTERNS
from onnx_export.rewrite.probe import axes_of
from onnx_export.rewrite.report import Attention, Change, RewriteReport
from onnx_export.rewrite.sizes import NEW_LENGTHS, PAST_LENGTHS, Sizes, input_roles
from onnx_export.rewrite.survey import (
    axes_read,
    caches_of,
    layer_numbers,
    name_of,
    plan,
    survey,
    unclaimed,
)

with extra("rewrite", __name__):
    import onnx
    import onnx_ir as ir
    from onnx import helper

__all__ = ["rewrite"]

PathLike = str | os.PathLike[str]


def rewrite(
    model: PathLike,
    out: PathLike,
    *,
    key: Scheme | str = "streaming4",
    value: Scheme | str | None = None,
    policy: Policy | Mapping[str, Any] | None = None,
    feedback: Mapping[Any, Feedback] | None = None,
    row_lengths: bool = False,
    opset: int | None = None,
    library: bool = False,
    cache: Literal["tensors", "buffers"] = "tensors",
    context_length: int | None = None,
    dry_run: bool = False,
) -> RewriteReport:
    """Write a decoder anew with quantized caches.

    Every attention with a cache that is understood becomes a node ``nsq.Attention``, and every
    tensor of its cache several. All else stays as it is; weights are neither read nor copied. What
    a decode loop must know of the caches is in the metadata of the new model, as
    `onnx_export.operators.cache_layout` says.

    Parameters
    ----------
    model : str or path
        A file of ONNX, its external data beside it.
    out : str or path
        The new file. In another folder than the model's, external data gets hard links there.
    key, value : Scheme or str
        Of the caches, with a block size and without outlier channels; ``value`` is ``key`` by
        default.
    policy : Policy or mapping, optional
        Layer by layer, as `nsq_ref.policy` says: ``{"default": ..., "layers": {"0": None,
        "7": "streaming4/streaming3"}}``. None leaves a layer as it is.
    feedback : mapping of str or int to Feedback, optional
        With which keys are coded (F1), by the number of the layer, as `nsq_ref.files.load_feedback`
        and `onnx_export.evaluation.moments` give it: it becomes initializers. Layers that are not
        named, and those that stay as they are, have none.
    row_lengths : bool
        Where a model counts its mask to know how many tokens each row has (GroupQueryAttention),
        take ``past_lengths`` and ``new_lengths`` as inputs instead. Rows can then grow apart, as a
        mask cannot tell of a row with a past how many of several new tokens are real.
    opset : int, optional
        Of the standard operators at least, 21 to 24; the model's own by default, or 21 where that
        is older. From 24 on the function of Attention appends in place, which is much faster where
        there is no library, and needs ONNX Runtime 1.26. A model whose nodes may mean something
        else in the newer opset is refused.
    library : bool
        Copy the native library beside the new file.
    cache : {"tensors", "buffers"}
        Buffers are one tensor a side and layer, by the names that the model has, of a size that the
        model fixes; only the native library runs them, and it is copied beside the new file. If
        ``genai_config.json`` is beside the model, one is written beside the new file, with the
        files of the tokenizer: onnxruntime-genai runs that folder as it is.
    context_length : int, optional
        Tokens that a row of buffers has room for; by default what the model says.
    dry_run : bool
        Only tell.

    Returns
    -------
    RewriteReport
        It names what was refused. Where all was, nothing is written.

    Raises
    ------
    TypeError, ValueError
        For what is no model, has no attention with a cache, schemes that a cache cannot have, a
        policy or feedback that does not fit the model, and buffers for onnxruntime-genai where it
        cannot run what would be written.
    OSError
        Where a file is missing or cannot be written. Nothing is half-written.

    Examples
    --------
    >>> import tempfile
    >>> from onnx.parser import parse_model
    >>> model = parse_model('''
    ...     <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
    ...     decoder (float[b, s, 64] qkv, int32[b] seqlens_k, int32 total,
    ...              float[b, 1, past, 16] past_0_key, float[b, 1, past, 16] past_0_value)
    ...         => (float[b, s, 32] output,
    ...             float[b, 1, all, 16] present_0_key, float[b, 1, all, 16] present_0_value) {
    ...         output, present_0_key, present_0_value = com.microsoft.GroupQueryAttention
    ...             <num_heads = 2, kv_num_heads = 1>
    ...             (qkv, , , past_0_key, past_0_value, seqlens_k, total)
    ...     }''')
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = Path(folder.name, "decoder.onnx"), Path(folder.name, "quantized.onnx")
    >>> onnx.save(model, source)
    >>> report = rewrite(source, target, key="streaming4", value="streaming3")
    >>> report.rewritten, report.complete
    (1, True)
    >>> [one.name for one in onnx.load(target).graph.input][2:5]
    ['total', 'past_key_values.0.key.packed', 'past_key_values.0.key.scale']
    >>> folder.cleanup()
    """
    source, target = Path(model), Path(out)
    least = OPSET if opset is None else as_integer("opset", opset, least=OPSET, most=NEWEST)
    proto = files.read(source)
    if target.exists() and os.path.samefile(source, target):
        raise ValueError(f"{target} is the model itself; choose another name for what is written")
    data = {os.path.realpath(source.parent / name) for name in files.external_files(proto)}
    if os.path.realpath(target) in data:
        raise ValueError(f"{target} holds weights of the model; choose another name")
    context = None
    if cache == "buffers":
        context = genai.Context(source.parent, target, context_length)
    elif cache != "tensors" or context_length is not None:
        raise ValueError("cache is tensors or buffers, and context_length is of buffers")
    native = library_path() if library or context is not None else None
    if not dry_run:
        atomic.require_writable(target, make_folders=True)

    proto = files.inlined(proto, {one for pattern in PATTERNS for one in pattern.ANCHORS})
    edit = _Edit(proto, source, key, value, policy, feedback, row_lengths, context)
    if not edit.plan.found:
        return edit.report()
    require_raisable(proto, least, without=edit.removed())
    edit.apply(least)
    beside = []
    if context is not None:
        stays = [one.node for one in edit.report().attentions if one.schemes is None]
        beside = context.beside(proto, stays, native, edit.context_length or 0)
    if dry_run:
        return edit.report()
    return edit.report(tuple(files.write(proto, source, target, native, beside)))


class _Edit:
    """One model on its way."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        source: Path,
        key: Scheme | str,
        value: Scheme | str | None,
        policy: Policy | Mapping[str, Any] | None,
        feedback: Mapping[Any, Feedback] | None,
        row_lengths: bool,
        context: genai.Context | None,
    ) -> None:
        if any(one.domain == DOMAIN for one in (*proto.opset_import, *proto.functions)):
            raise ValueError(f"{source} has operators of {DOMAIN} already; rewrite its original")
        self.proto = proto
        self.graph = Graph(files.as_ir(proto, source.parent))  # which puts nodes in order
        if fault := unsound(proto):
            raise ValueError(f"{source}: the graph cannot be read: {fault}")
        self.known = _known_layout(proto)
        self.roles = self.known.roles if self.known else {n: n for n in input_roles(self.graph)}
        # Such a model says itself how many tokens each row has.
        self.row_lengths = row_lengths or {PAST_LENGTHS, NEW_LENGTHS} <= set(self.roles.values())
        results = survey(self.graph)
        if not results:
            raise ValueError(
                f"{source} has no attention with a cache that is known; export it with past keys "
                "and values as inputs"
            )
        self.results = results
        found = [one for one in results if isinstance(one, Found)]
        self.layers = layer_numbers(found)
        key = as_scheme("key", key)
        usual = KeyValueSchemes(key, key if value is None else as_scheme("value", value))
        chosen = Policy.of({} if policy is None else policy, usual)
        given: dict[int, Feedback] = {}
        if feedback is not None:
            heads = {layer: (one.kv_heads, one.head_dim) for one, layer in self.layers.items()}
            given = feedback_of_layers(feedback, heads, has_others=len(found) < len(results))
        self.feedback = {one: given[at] for one, at in self.layers.items() if at in given}
        by_layer = chosen.schemes(list(self.layers.values()), given)
        self.schemes = {one: by_layer[layer] for one, layer in self.layers.items()}
        self.digests = {one: feedback.digest for one, feedback in self.feedback.items()}
        self.context_length: int | None = None
        if context is not None:
            self.context_length = context.length(self._context_length(found))
        self.tensors = {one: self._quantized(one) for one in found if self.schemes[one]}
        if found and not self.tensors:
            raise ValueError("the policy leaves every layer as it is; name a scheme for one")
        self.plan = plan(self.graph, self.tensors)
        self.opset = (self.graph.opset, self.graph.opset)
        self.new_inputs: list[str] = []

    def _quantized(self, found: Found) -> tuple[CacheTensor, ...]:
        schemes = self.schemes[found]
        layer = self.layers[found]
        if schemes is None:
            return ()
        sizes: dict[str, Any] = {
            "kv_heads": found.kv_heads, "head_dim": found.head_dim,
            "value_head_dim": found.value_head_dim, "dtype": found.dtype,
        }  # fmt: skip
        try:
            if self.context_length is None:
                return quantized_tensors(layer, *schemes, **sizes)
            names = [(one.past.name or "", one.present.name or "") for one in caches_of(found)]
            return buffer_tensors(
                layer, *schemes, **sizes, context_length=self.context_length, names=names
            )
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error

    # --- the message -----------------------------------------------------------------------------

    def removed(self) -> set[str]:
        """Return the first outputs of nodes that are replaced, or read by nobody any longer."""
        return {node.outputs[0].name or "" for node in self.plan.removed}

    def apply(self, opset: int = OPSET) -> None:
        """Change the message, its opset to one that is not older."""
        graph = self.proto.graph
        prefix = unused_prefix(graph)
        sizes = Sizes(self.graph, f"{prefix}sizes_")
        make = Attentions(self.graph, sizes, prefix, row_lengths=self.row_lengths)
        at = dict(zip(self.graph.model.graph, graph.node, strict=True))
        anchors = {one.node: one for one in self.plan.found}
        nodes: list[onnx.NodeProto] = []
        for node, message in at.items():
            if node in anchors:
                found = anchors[node]
                schemes = self.schemes[found]
                if schemes is not None:
                    feedback = self.feedback.get(found)
                    nodes += make(found, self.layers[found], schemes, self.tensors[found], feedback)
            elif node in self.plan.shapes and node not in self.plan.removed:
                nodes += self._shape(node, message, sizes, f"{prefix}shape_{len(nodes)}_")
            elif node not in self.plan.removed:
                nodes.append(message)
        kept = [*sizes.add.nodes, *nodes]
        names = {one.name or "" for node in self.plan.removed for one in node.outputs}
        names -= {one.output.value.name or "" for one in self.plan.found}
        unused = self._unused(kept)
        replace(graph.node, kept)
        remove(graph.initializer, lambda one: one.name in unused)
        graph.initializer.extend(make.initializers)
        remove(graph.value_info, lambda one: one.name in names)
        remove(graph.quantization_annotation, lambda one: one.tensor_name in names | unused)
        self._replace_caches()
        for name in (PAST_LENGTHS, NEW_LENGTHS):
            if name in sizes.needed:
                self._add_lengths(name)
        self._finish(opset)

    def _shape(
        self, node: ir.Node, message: onnx.NodeProto, sizes: Sizes, prefix: str
    ) -> list[onnx.NodeProto]:
        """Return nodes that make what Shape of a cache made."""
        found, cache = self.plan.shapes[node]
        add = Nodes(prefix)
        value = node.inputs[0] or cache.past
        if value in cache[:2]:
            parts = sizes.shape_of(found, cache, value, axes_read(node, cache), add)
        else:
            start, end = (node.attributes.get_int(name, None) for name in ("start", "end"))
            axes = axes_of(self.graph, value) or []
            parts = sizes.shape_of_moved(found, cache, axes[start:end], add)
        add.several("Concat", parts, list(message.output), axis=0, name=message.name)
        return add.nodes

    def _unused(self, kept: list[onnx.NodeProto]) -> set[str]:
        """Return the initializers that only what was removed has read."""
        read = {name for node in kept for name in node.input}
        unused = set()
        for name, value in self.graph.model.graph.initializers.items():
            users = {use.node for use in value.uses()}
            if users and users <= self.plan.removed and name not in read:
                unused.add(name)
        return unused - {one.name or "" for one in self.graph.model.graph.outputs}

    def _replace_caches(self) -> None:
        """Put the new tensors where the old ones were among inputs and outputs."""
        new: dict[str, list[CacheTensor]] = {}
        for found in self.plan.found:
            for side, cache in zip(("key", "value"), caches_of(found), strict=True):
                tensors = [one for one in self.tensors[found] if (one.part or "").startswith(side)]
                for one in cache[:2]:
                    new[one.name or ""] = tensors
        for infos, which in (
            (self.proto.graph.input, "past"),
            (self.proto.graph.output, "present"),
        ):
            kept = []
            for info in infos:
                if info.name in new:
                    kept += [value_info(getattr(one, which), one) for one in new[info.name]]
                else:
                    kept.append(info)
            names = [one.name for one in kept]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(
                    f"the model has an input or output {twice[0]!r} already; rename it"
                )
            replace(infos, kept)

    def _add_lengths(self, name: str) -> None:
        graph = self.proto.graph
        for one in self.graph.model.graph.inputs:
            if one.name == name and one.dtype == ir.DataType.INT64 and self.graph.rank(one) == 1:
                return
        taken = {one.name for one in (*graph.input, *graph.initializer)}
        if name in taken | {output for node in graph.node for output in node.output}:
            raise ValueError(f"the model has a tensor {name!r} already; rename it")
        graph.input.append(helper.make_tensor_value_info(name, ELEMENTS["int64"], ["batch_size"]))
        self.new_inputs.append(name)

    def _finish(self, opset: int) -> None:
        opset = raise_opset(self.proto, opset)
        self.opset = self.opset[0], opset
        if self.context_length is None:  # what buffers hold is no function's
            self.proto.functions.extend(functions(opset, self.proto.graph.node))
        self.proto.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
        remove(self.proto.metadata_props, lambda one: one.key == KEY)
        if (layout := self._layout()) is not None:
            for name, text in layout.to_metadata().items():
                self.proto.metadata_props.add(key=name, value=text)
        check_nodes(self.proto)
        if fault := unsound(self.proto):
            raise RuntimeError(fault)  # of the rewriter, as the model was sound

    def _layout(self) -> CacheLayout | None:
        """Return what a loop must know; None where caches are not understood that stay."""
        floats = [self._float(found) for found in self.layers if found not in self.plan.found]
        floats += [self._unknown(one) for one in self.results if isinstance(one, Refused)]
        if unclaimed(self.graph, self.results) or None in floats:
            return None
        tensors = [one for found in self.plan.found for one in self.tensors[found]]
        tensors += [one for several in floats for one in several or ()]
        if len({one.past for one in tensors}) < len(tensors):
            return None  # what shares a cache was refused
        by_layer: list[KeyValueSchemes | None] = [None] * (max(self.layers.values()) + 1)
        digests: list[str | None] = [None] * len(by_layer)
        blocks = [1]
        for found in self.plan.found:
            by_layer[self.layers[found]] = pair = self.schemes[found]
            digests[self.layers[found]] = self.digests.get(found)
            blocks += [scheme.block_size or 1 for scheme in pair or ()]
        roles = {**self.roles, **{name: name for name in self.new_inputs}}
        for found in self.plan.found:
            if (past := found.lengths.past) is not None and past.is_graph_input():
                roles.setdefault("past_lengths", past.name or "")
            total = found.lengths.total
            if total is not None and total.is_graph_input() and not found.lengths.total_offset:
                roles.setdefault("total_lengths", total.name or "")
        outputs = [one.name for one in self.proto.graph.output]
        if "logits" in outputs:
            roles.setdefault("logits", "logits")
        lengths = [found.lengths for found in self.layers]
        counts = any(one.total is not None and one.past is None for one in lengths)
        return CacheLayout(
            roles,
            tuple(tensors),
            tuple(by_layer),
            math.lcm(*blocks),
            self.context_length or self._context_length(self.plan.found),
            right_padding=counts and NEW_LENGTHS not in roles,
            key_feedback=tuple(digests) if any(digests) else (),
        )

    def _float(self, found: Found) -> list[CacheTensor] | None:
        """Return the cache of a layer that stays as it is."""
        tensors = []
        channels = found.head_dim, found.value_head_dim
        for cache, size in zip(caches_of(found), channels, strict=True):
            growing = "past" if found.lengths.past is None else "capacity"
            sizes: dict[str, int | str] = {
                "B": "batch", "N": found.kv_heads, "S": cache.capacity or growing, "D": size,
                "H": found.kv_heads * size,
            }  # fmt: skip
            shape = tuple(sizes[axis] for axis in cache.layout)
            names = cache.past.name or "", cache.present.name or ""
            tensors.append(CacheTensor(*names, found.dtype, shape))
        return tensors

    def _unknown(self, refused: Refused) -> list[CacheTensor] | None:
        """Return the cache of an attention that was refused, if the model states its shape."""
        tensors = []
        for cache in refused.caches:
            sizes: list[int | str | None] = [
                {"B": "batch", "S": cache.capacity or "past"}.get(axis)
                or self.graph.size(cache.past, number)
                for number, axis in enumerate(cache.layout)
            ]
            dtype = self.graph.dtype(cache.past)
            if None in sizes or dtype is None or not cache.past.is_graph_input():
                return None
            names = cache.past.name or "", cache.present.name or ""
            tensors.append(CacheTensor(*names, dtype, tuple(one or 0 for one in sizes)))
        return tensors if len(tensors) == 2 else None

    def _context_length(self, attentions: list[Found]) -> int | None:
        """Return the positions that the model says it has, or has rotations for."""
        if self.known is not None and self.known.context_length is not None:
            return self.known.context_length
        known = [
            self.graph.size(found.rotary.cos, 0) for found in attentions if found.rotary is not None
        ]
        return min((one for one in known if one), default=None)

    # --- the report ------------------------------------------------------------------------------

    def report(self, written: tuple[Path, ...] = ()) -> RewriteReport:
        """Return what was done, or would be."""
        reasons = {one.node: one.reason for one in self.plan.refused}
        attentions = []
        for one in self.results:
            name = name_of(one.node)
            if isinstance(one, Refused):
                attentions.append(Attention(None, name, one.node.op_type, None, one.reason))
            else:
                reason = reasons.get(one.node)
                schemes = None if reason else self.schemes[one]
                digest = None if schemes is None else self.digests.get(one)
                attentions.append(
                    Attention(self.layers[one], name, one.pattern, schemes, reason, digest)
                )
        attentions += [
            Attention(None, name, "", None, "no attention that is known reads this cache")
            for name in unclaimed(self.graph, self.results)
        ]
        telling = PAST_LENGTHS if PAST_LENGTHS in self.new_inputs else "inputs of the model"
        changes = [
            Change(name_of(node), f"took sizes from {node.inputs[0].name}, now from {telling}")
            for node in self.plan.shapes
            if node.inputs[0] is not None
        ]
        core = {node for one in self.plan.found for node in one.nodes}
        removed = [
            name_of(one) for one in self.graph.model.graph if one in self.plan.removed - core
        ]
        return RewriteReport(
            tuple(attentions), tuple(changes), tuple(removed), tuple(self.new_inputs), self.opset,
            written,
        )  # fmt: skip


def _known_layout(model: onnx.ModelProto) -> CacheLayout | None:
    """Return what the model says of its cache of floats, if one of ours wrote it."""
    metadata = {one.key: one.value for one in model.metadata_props}
    return CacheLayout.from_metadata(metadata) if KEY in metadata else None
