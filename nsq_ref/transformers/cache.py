"""`NsqCache`, and the layers that it is made of."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from nsq_ref.arrays import as_array, as_integer
from nsq_ref.cache import KVCache
from nsq_ref.cache.arguments import as_sides
from nsq_ref.feedback import Feedback
from nsq_ref.files import load_feedback
from nsq_ref.policy import Policy, feedback_of_layers
from nsq_ref.profiles import require_feedback
from nsq_ref.scheme import KeyValueSchemes, PairName, Scheme, SchemeName
from nsq_ref.transformers.passes import Pass, Stored, Tensor

__all__ = ["NsqCache", "NsqLayer"]

Schemes = tuple[Scheme, Scheme]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NsqCache(Cache):
    """A cache for ``model.generate(past_key_values=...)``, quantized block by block.

    For one thread at a time, as all caches of transformers.

    Each layer of full attention has a `KVCache`; layers of other kinds, such as those with a
    sliding window, and recurrent states are transformers' own, as in a ``DynamicCache``.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model, a decoder.
    key, value : Scheme or str, optional
        As `KVCache` takes them; ``"streaming4"`` by default. ``key`` alone may be a pair. The
        profiles ``best-*`` are made for ``key_feedback`` of every layer that they are for.
    policy : mapping of int, sequence, or what `nsq_ref.policy` reads, optional
        Schemes of single layers: a pair ``(key, value)``, or the name of one such as
        ``"nsep+KIVI"``; None leaves a layer in floating point. Layers that a mapping does not name
        have ``key`` and ``value``; a sequence has an entry for every layer. What a file of
        ``nsq audit --policy`` holds, ``{"default": ..., "layers": {"0": ...}}``, is taken as it is.
    block_size : int, optional
        Of schemes that have none.
    attention_mask : int tensor, shape [batch, T], optional
        That of the prompt, where it is padded on the left: the padding of each row is then not
        stored, and the row has the bytes that it would have alone. Otherwise padding is stored as
        any token, which wastes its bytes and the sinks. Rows may be repeated later, as beams are.
    key_feedback : mapping of int or str to Feedback, or path, optional
        With which keys are coded (F1), by the number of the layer: of this model, as
        `query_moments` makes it, or a file of `nsq_ref.files.save_feedback`, which
        ``nsq onnx calibrate`` writes too. Layers that are not named, and those that stay in
        floating point, have none. A layer's heads are known when its first keys come: those of
        another model are refused then.

    Raises
    ------
    TypeError, ValueError
        For what is no scheme, schemes without a block size, a policy for other layers than those
        that there are or can be quantized, padding that is not on the left, feedback of layers
        that there are not, layers without that have the name of a profile that is made for it, and
        models that are no decoders.
    OSError
        Where a file of feedback cannot be read.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1,
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = NsqCache(config, policy={0: None})
    >>> prompt = torch.arange(300)[None] % 64
    >>> tokens = model.generate(
    ...     prompt, cache=cache, max_new_tokens=5, attention_mask=torch.ones_like(prompt)
    ... )
    >>> cache.get_seq_length(), cache.layers[1].kv_cache
    (304, KVCache(lengths=[304], kv_heads=1, head_dim=16, bits_per_element=...
    """

    def __init__(
        self,
        config: Any,
        key: Scheme | KeyValueSchemes | SchemeName | PairName | None = None,
        value: Scheme | SchemeName | None = None,
        *,
        policy: Policy | Mapping[Any, Any] | Sequence[Any] | None = None,
        block_size: int | None = None,
        attention_mask: Any = None,
        key_feedback: Mapping[Any, Feedback] | str | os.PathLike[str] | None = None,
    ) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                "config is of an encoder with a decoder; NsqCache is for models that are decoders"
            )
        usual = _schemes(key, value, block_size)
        layers = DynamicCache(config=config).layers
        full = {i: KINDS[type(layer)] for i, layer in enumerate(layers) if type(layer) in KINDS}
        if not full:
            raise ValueError("config has no layer of full attention, so none to quantize")
        feedback = _feedback(key_feedback, len(layers))
        chosen = _chosen(policy, len(layers), usual, full, block_size, feedback)
        for index, schemes in chosen.items():
            if schemes is not None and index not in full:
                raise ValueError(
                    f"policy[{index}] is for a layer that is no full attention, and keeps "
                    f"transformers' own {type(layers[index]).__name__}; leave it out, or give None"
                )
        padding = None if attention_mask is None else _padding(attention_mask)
        for index, kind in full.items():
            if index not in chosen:
                _require_feedback(index, key, feedback)
            schemes = chosen.get(index, usual)
            if schemes is not None:
                states = getattr(layers[index], "number_of_states", None)
                options = {} if states is None else {"number_of_states": states}
                layers[index] = kind(schemes, padding, feedback.get(index), index, **options)
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, layers in floating point and recurrent states included."""
        held = tree_leaves([vars(layer) for layer in self.layers])
        caches = [layer.kv_cache for layer in self.layers if isinstance(layer, NsqLayer)]
        tensors = [x for x in held if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return sum(x.nbytes for x in caches + tensors if x is not None)


def _held(side: int) -> property:
    """Return the property ``keys`` or ``values``, which models read that attend to an image."""

    def decoded(layer: NsqLayer) -> Tensor | None:
        cache = layer.kv_cache
        if cache is None:
            return None
        none = (
            torch.empty(cache.batch, cache.kv_heads, 0, dim, dtype=layer._dtype)
            for dim in (cache.head_dim, cache.value_head_dim)
        )
        return Stored.both(Pass(cache, layer._length, *none))[side]

    return property(decoded, lambda layer, _: None)  # transformers' own class clears what it holds


class NsqLayer(DynamicLayer):
    """Keys and values of one layer, as `NsqCache` makes it.

    For one thread at a time.

    Parameters
    ----------
    schemes : pair of Scheme
        Of keys and of values, with block sizes.
    padding : sequence of int, optional
        Tokens on the left of each row that are not stored.
    key_feedback : Feedback, optional
        With which keys are coded (F1).
    number : int
        Of the layer, for errors.

    Attributes
    ----------
    kv_cache : KVCache or None
        What is stored; None before the first pass.
    keys, values : tensor or None
        The same, decoded when something computes with them.
    """

    supports_early_init = False
    keys, values = _held(0), _held(1)

    def __init__(
        self,
        schemes: Schemes,
        padding: Sequence[int] | None = None,
        key_feedback: Feedback | None = None,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.schemes, self.padding, self.key_feedback = schemes, padding, key_feedback
        self.number = number
        self.reset()

    def __repr__(self) -> str:
        held = self.schemes if self.kv_cache is None else self.kv_cache
        return f"{type(self).__name__}({held})"

    def reset(self) -> None:
        """Drop all tokens; the padding is that of the start again."""
        self.kv_cache: KVCache | None = None
        self.is_initialized = False
        self._length = 0  # positions, padding included
        self._leads: list[int] = []  # those of each row that are padding
        self._last: Pass | None = None

    @torch.compiler.disable  # compiled models leave their graph here
    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens, and return all there are: these as they are, those before as stored.

        Raises
        ------
        TypeError, ValueError
            For tensors that are not on the CPU or need a gradient, feedback of other heads, and
            what `KVCache.append` refuses. Nothing was appended then.
        """
        key_states, value_states = _taken(key_states, value_states)
        rows, before = len(key_states), self.kv_cache
        if before is None:
            before = self._empty(key_states, value_states)
        elif before.batch != rows:
            raise ValueError(
                f"NsqCache holds {before.batch} rows and the model runs {rows}; reset() it, or "
                "make another for other prompts"
            )
        this = Pass(before, self._length, key_states, value_states)
        # The last block is kept, so that `crop` can take back tokens that a block was sealed with.
        last = this.split(self._leads, max(scheme.block_size or 1 for scheme in self.schemes))
        self.kv_cache, self._last = last.after(self._leads), last
        self.is_initialized, self._dtype = True, key_states.dtype
        self._length += this.tokens
        if not this.start:
            return key_states, value_states
        return Stored.both(this)

    def _empty(self, keys: Tensor, values: Tensor) -> KVCache:
        """Return the cache for keys and values of these shapes."""
        batch, kv_heads, _, head_dim = keys.shape
        padding = [0] * batch if self.padding is None else self.padding
        if batch % len(padding):
            raise ValueError(
                f"attention_mask of NsqCache has {len(padding)} rows and the model runs {batch}; "
                "give that of this prompt"
            )
        if self.key_feedback is not None:
            heads = {self.number: (kv_heads, head_dim)}
            feedback_of_layers({self.number: self.key_feedback}, heads, name="key_feedback")
        self._leads = [lead for lead in padding for _ in range(batch // len(padding))]
        return KVCache(
            batch, kv_heads, head_dim, *self.schemes, value_head_dim=values.shape[3],
            key_feedback=self.key_feedback,
        )  # fmt: skip

    def get_seq_length(self) -> int:
        """Positions that are held, padding included."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the first tokens only.

        If all that go came with the last pass, and are no more than a block, the layer is as if it
        had brought the others only: so tokens that assisted decoding rejects leave no trace.
        Otherwise tokens of a block that was sealed return as their decoded values (C1).

        Parameters
        ----------
        tokens_to_remove : int
            If negative, how many to drop; if positive, as in older versions, how many to keep.
        """
        count = as_integer("tokens_to_remove", tokens_to_remove)
        length = max(self._length + count, 0) if count <= 0 else min(count, self._length)
        if length == self._length or self.kv_cache is None:
            return
        last = self._last
        if last is not None and length >= last.start:
            self._last = last.first(length - last.start)
            self.kv_cache = self._last.after(self._leads)
        else:
            self._last = None
            self.kv_cache = self.kv_cache.fork()
            self.kv_cache.crop([max(length - lead, 0) for lead in self._leads])
        self._length = length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace the rows by these; any may recur or be left out."""
        if self.kv_cache is not None:
            self.kv_cache = self.kv_cache.fork(indices)
            self._leads = [self._leads[row] for row in indices]
            self._last = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by these."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies beside each other."""
        self.batch_select_indices(torch.arange(len(self._leads)).repeat_interleave(repeats))

    def offload(self) -> None:
        """Refuse: what is stored is in the memory of the CPU."""
        raise NotImplementedError("NsqCache is stored on the CPU already, and cannot be offloaded")

    prefetch = offload


class NsqHybridLayer(LinearAttentionLayer, NsqLayer):
    """A layer that has recurrent states, which are transformers' own, as well as attention."""

    is_compileable = False

    def __init__(
        self,
        schemes: Schemes,
        padding: Sequence[int] | None = None,
        key_feedback: Feedback | None = None,
        number: int = 0,
        **options: Any,
    ) -> None:
        LinearAttentionLayer.__init__(self, **options)
        NsqLayer.__init__(self, schemes, padding, key_feedback, number)

    def reset(self) -> None:
        """Drop all tokens and states."""
        NsqLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the first tokens only, where states can be taken back as well."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        NsqLayer.crop(self, tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace the rows by these; any may recur or be left out."""
        LinearAttentionLayer.reorder_cache(self, indices)
        NsqLayer.batch_select_indices(self, indices)

    reorder_cache = NsqLayer.reorder_cache
    offload = prefetch = NsqLayer.offload


KINDS = {DynamicLayer: NsqLayer, LinearAttentionAndFullAttentionLayer: NsqHybridLayer}


# --- arguments ----------------------------------------------------------------------------------


def _taken(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return tensors of one dtype, as autocast mixes them; what is no cache's is refused."""
    dtype = torch.promote_types(keys.dtype, values.dtype)
    for name, x in {"key_states": keys, "value_states": values}.items():
        if dtype not in DTYPES:
            raise TypeError(
                f"{name} is {x.dtype}; NsqCache keeps float32, float16 and bfloat16: run the "
                "model as one of them, as model.float()"
            )
        if x.requires_grad:
            raise TypeError(
                f"{name} needs a gradient, which what is stored has not; run the model within "
                "torch.no_grad(), or train it without a cache"
            )
        if x.device.type != "cpu":
            raise ValueError(f"{name} is on {x.device}; NsqCache runs on the CPU, model.to('cpu')")
    return keys.to(dtype), values.to(dtype)


def _schemes(key: Any, value: Any, block_size: int | None) -> Schemes:
    """Take schemes as `KVCache` does."""
    sides = as_sides(1, 1, None, key, value, block_size)
    return sides.keys.scheme, sides.values.scheme


def _chosen(
    policy: Any,
    layers: int,
    usual: Schemes,
    full: Container[int],
    block_size: int | None,
    feedback: Mapping[int, Feedback],
) -> dict[int, Schemes | None]:
    """Return the schemes of the layers that a policy names."""
    if policy is None:
        return {}
    if isinstance(policy, Policy) or (
        isinstance(policy, Mapping) and policy and set(policy) <= {"default", "layers"}
    ):
        read = Policy.of(policy, KeyValueSchemes(*usual))
        for_all = isinstance(policy, Policy) or "default" in policy
        others = (layer for layer in range(layers) if layer not in full)
        return {
            layer: None if pair is None else _schemes(*pair, block_size)
            for layer, pair in read.schemes(range(layers), {*feedback, *others}).items()
            if layer in read.layers or (for_all and layer in full)
        }
    if isinstance(policy, Sequence) and not isinstance(policy, str):
        if len(policy) != layers:
            raise ValueError(f"policy has {len(policy)} entries; the model has {layers} layers")
        policy = dict(enumerate(policy))
    elif not isinstance(policy, Mapping):
        raise TypeError(f"policy={policy!r:.80} is no mapping of layers, and no sequence")
    chosen: dict[int, Schemes | None] = {}
    for layer, entry in policy.items():
        index = as_integer("a layer of policy", layer, least=0, most=layers - 1)
        try:
            require_feedback(entry, feedback.get(index))
            chosen[index] = None if entry is None else _pair(entry, block_size)
        except (TypeError, ValueError) as error:
            raise type(error)(f"policy[{index}]: {error}") from None
    return chosen


def _pair(entry: Any, block_size: int | None) -> Schemes:
    """Take the schemes of one layer."""
    pair = Scheme.named(entry) if isinstance(entry, str) else entry
    if not isinstance(pair, tuple | list) or len(pair) != 2 or None in pair:
        raise TypeError(
            f"{entry!r:.80} is no pair of schemes (key, value); None leaves the layer in floating "
            "point"
        )
    return _schemes(pair[0], pair[1], block_size)


def _require_feedback(layer: int, name: Any, feedback: Mapping[int, Feedback]) -> None:
    """Refuse a layer without the feedback that a profile is made for."""
    try:
        require_feedback(name, feedback.get(layer))
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from None


def _feedback(given: Any, layers: int) -> dict[int, Feedback]:
    """Return the feedback of the layers that have some."""
    if given is None:
        return {}
    if isinstance(given, str | os.PathLike):
        given = load_feedback(given)
    return feedback_of_layers(given, dict.fromkeys(range(layers)), name="key_feedback")


def _padding(attention_mask: Any) -> list[int]:
    """Return how many tokens on the left of each row are padding."""
    mask = as_array("attention_mask", attention_mask)
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; give [batch, T]")
    real = mask != 0
    for row, shown in enumerate(real):
        if not shown.any() or not shown[int(shown.argmax()) :].all():
            raise ValueError(
                f"attention_mask[{row}] is not zeros, then ones; pad prompts on the left"
            )
    return [int(shown.argmax()) for shown in real]
