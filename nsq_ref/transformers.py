"""A quantized cache for Hugging Face transformers, and an attention that reads it as it is stored.

`NsqCache` is handed to ``model.generate`` in place of a ``DynamicCache``. What a forward pass
brings is attended to as it is, what came before it as it is stored: so no result ever depends on
later tokens, and all results are those of a ``DynamicCache`` until the first block is sealed.

Importing this module registers the attention function ``"nsq"``. With any other function the keys
and values of a layer are decoded, for as long as that layer runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nsq_ref.arrays import as_array, as_integer
from nsq_ref.cache import KVCache, attending
from nsq_ref.cache.arguments import as_sides
from nsq_ref.extras import extra
from nsq_ref.scheme import KeyValueSchemes, PairName, Scheme, SchemeName

with extra("transformers", "nsq_ref.transformers"):
    import torch
    from torch.utils._pytree import tree_map_only
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AttentionInterface,
        AttentionMaskInterface,
    )
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

__all__ = ["NsqCache", "NsqLayer", "attention"]

Tensor = Any  # torch.Tensor, where torch is installed

Schemes = tuple[Scheme, Scheme]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_QUERIES = 16  # tokens of one pass for which reading codes is quicker than decoding them all


class NsqCache(Cache):
    """A cache for ``model.generate(past_key_values=...)``, quantized block by block.

    For one thread at a time, as all caches of transformers.

    Each layer of full attention has a `KVCache`; layers of other kinds, such as those with a
    sliding window, are transformers' own, as in a ``DynamicCache``.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model, a decoder.
    key, value : Scheme or str, optional
        As `KVCache` takes them; ``"streaming4"`` by default. ``key`` alone may be a pair.
    policy : mapping of int, or sequence, optional
        Schemes of single layers: a pair ``(key, value)``, or the name of one such as
        ``"nsep+KIVI"``; None leaves a layer in floating point. Layers that a mapping does not name
        have ``key`` and ``value``; a sequence has an entry for every layer.
    block_size : int, optional
        Of schemes that have none.
    attention_mask : int tensor, shape [batch, T], optional
        That of the prompt, where it is padded on the left: the padding of each row is then not
        stored, and the row has the bytes that it would have alone. Otherwise padding is stored as
        any token, which wastes its bytes and the sinks. Rows may be repeated later, as beams are.

    Raises
    ------
    TypeError, ValueError
        For what is no scheme, schemes without a block size, a policy for other layers than those
        that there are or can be quantized, padding that is not on the left, and models that are
        no decoders.

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
        policy: Mapping[int, Any] | Sequence[Any] | None = None,
        block_size: int | None = None,
        attention_mask: Any = None,
    ) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                "config is of an encoder with a decoder; NsqCache is for models that are decoders"
            )
        usual = _schemes(key, value, block_size)
        layers = DynamicCache(config=config).layers
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise ValueError("config has no layer of full attention, so none to quantize")
        chosen = _chosen(policy, len(layers), block_size)
        for index, schemes in chosen.items():
            if schemes is not None and index not in full:
                raise ValueError(
                    f"policy[{index}] is for a layer that is no full attention, and keeps "
                    f"transformers' own {type(layers[index]).__name__}; leave it out, or give None"
                )
        padding = None if attention_mask is None else _padding(attention_mask)
        for index in full:
            schemes = chosen.get(index, usual)
            if schemes is not None:
                layers[index] = NsqLayer(schemes, padding)
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, layers in floating point included."""
        return sum(map(_bytes_of, self.layers))


class NsqLayer(CacheLayerMixin):  # type: ignore[misc, unused-ignore]
    """Keys and values of one layer, as `NsqCache` makes it.

    For one thread at a time.

    Parameters
    ----------
    schemes : pair of Scheme
        Of keys and of values, with block sizes.
    padding : sequence of int, optional
        Tokens on the left of each row that are not stored.

    Attributes
    ----------
    kv_cache : KVCache or None
        What is stored; None before the first pass.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, schemes: Schemes, padding: Sequence[int] | None = None) -> None:
        super().__init__()
        self.schemes, self.padding = schemes, padding
        self.reset()

    def __repr__(self) -> str:
        return f"NsqLayer({self.schemes if self.kv_cache is None else self.kv_cache})"

    def reset(self) -> None:
        """Drop all tokens; the padding is that of the start again."""
        self.kv_cache: KVCache | None = None
        self.is_initialized = False
        self._length = 0  # positions, padding included
        self._leads: list[int] = []  # those of each row that are padding
        self._last: _Pass | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> KVCache:
        """Return the cache for keys and values of these shapes, still empty."""
        batch, kv_heads, _, head_dim = key_states.shape
        padding = [0] * batch if self.padding is None else self.padding
        if batch % len(padding):
            raise ValueError(
                f"attention_mask of NsqCache has {len(padding)} rows and the model runs {batch}; "
                "give that of this prompt"
            )
        self._leads = [lead for lead in padding for _ in range(batch // len(padding))]
        value_head_dim = value_states.shape[3]
        return KVCache(batch, kv_heads, head_dim, *self.schemes, value_head_dim=value_head_dim)

    @torch.compiler.disable  # compiled models leave their graph here
    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens, and return all there are: these as they are, those before as stored.

        Raises
        ------
        TypeError, ValueError
            For tensors that are not on the CPU or need a gradient, and what `KVCache.append`
            refuses. Nothing was appended then.
        """
        rows, before = len(key_states), self.kv_cache
        if before is not None and before.batch != rows:
            raise ValueError(
                f"NsqCache holds {before.batch} rows and the model runs {rows}; reset() it, or "
                "make another for other prompts"
            )
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)  # autocast mixes them
        for name, x in {"key_states": key_states, "value_states": value_states}.items():
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
                raise ValueError(
                    f"{name} is on {x.device}; NsqCache runs on the CPU, model.to('cpu')"
                )
        key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if before is None:
            before = self.lazy_initialization(key_states, value_states)
        this = _Pass(before, self._length, key_states, value_states)
        # The last block is kept, so that `crop` can take back tokens that a block was sealed with.
        recent = this.last(max(scheme.block_size or 1 for scheme in self.schemes))
        older = recent.start - this.start
        if older:
            keys, values = key_states[:, :, :older], value_states[:, :, :older]
            recent = recent._replace(
                before=_Pass(before, this.start, keys, values).after(self._leads)
            )
        self.kv_cache, self._last = recent.after(self._leads), recent
        self.is_initialized = True
        self._length += key_states.shape[2]
        if not this.start:
            return key_states, value_states
        decode = functools.cache(this.decoded)
        return Stored(this, 0, decode), Stored(this, 1, decode)

    def get_seq_length(self) -> int:
        """Positions that are held, padding included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that a mask is for, and the first of them."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """There is no limit, which transformers calls -1."""
        return -1

    get_max_cache_shape = get_max_length  # its name before

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
        last, self._last = self._last, None
        if last is None or length < last.start:
            self.kv_cache = self.kv_cache.fork()
            self.kv_cache.crop([max(length - lead, 0) for lead in self._leads])
            self._length = length
            return
        self.kv_cache, self._length = last.before, last.start
        if more := length - last.start:
            self.update(last.keys[:, :, :more], last.values[:, :, :more])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by these."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace the rows by these; any may recur or be left out."""
        if self.kv_cache is not None:
            self.kv_cache = self.kv_cache.fork(indices)
            self._leads = [self._leads[row] for row in indices]
            self._last = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies beside each other."""
        rows = range(len(self._leads))
        self.batch_select_indices([row for row in rows for _ in range(repeats)])

    def offload(self) -> None:
        """Refuse: what is stored is in the memory of the CPU."""
        raise NotImplementedError("NsqCache is stored on the CPU already, and cannot be offloaded")

    prefetch = offload


class _Pass(NamedTuple):
    """What a layer held before a forward pass, and what that brought."""

    before: KVCache
    start: int  # positions before it
    keys: Tensor
    values: Tensor

    def last(self, most: int) -> _Pass:
        """Return the pass of its last tokens, which hold no memory of the others."""
        older = self.keys.shape[2] - most
        if older <= 0:
            return self
        keys, values = (x[:, :, older:].clone() for x in (self.keys, self.values))
        return _Pass(self.before, self.start + older, keys, values)

    def after(self, leads: Sequence[int]) -> KVCache:
        """Return a cache with all tokens but those of the first positions of each row."""
        tokens = self.keys.shape[2]
        skips = [min(max(lead - self.start, 0), tokens) for lead in leads]
        keys, values = (_left_aligned(x, skips) for x in (self.keys, self.values))
        cache = self.before.fork()
        cache.append(keys, values, [tokens - skip for skip in skips])
        return cache

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, padding that is not stored as zeros."""
        keys, values = self.before.dequantize()
        return self._joined(keys, self.keys), self._joined(values, self.values)

    def _joined(self, stored: Any, new: Tensor) -> Tensor:
        """Put what is stored, each row up to ``start``, before what is new."""
        most = torch.finfo(new.dtype).max
        batch, kv_heads, tokens, head_dim = new.shape
        joined = new.new_empty(batch, kv_heads, self.start + tokens, head_dim)
        for row, length in enumerate(self.before.lengths.tolist()):
            past = torch.from_numpy(stored[row, :, :length])
            if new.dtype != torch.float32:  # which has no number so large as some of float32
                past.clamp_(-most, most)
            joined[row, :, : self.start - length] = 0
            joined[row, :, self.start - length : self.start] = past
        joined[:, :, self.start :] = new
        return joined

    def attended(self, query: Tensor, **options: Any) -> Tensor:
        """Return the output of `attention`, read from what is stored."""
        cache, new = self.before, (self.keys, self.values)
        output = attending.attend(cache._sides, cache._now, query, None, False, new, **options)
        return torch.from_numpy(output).to(query.dtype).transpose(1, 2).contiguous()

    @property
    def sealed(self) -> bool:
        """Whether any block is."""
        schemes = self.before.key, self.before.value
        return any(scheme.cut(len(self.before)).sealed for scheme in schemes)

    def is_causal(self, mask: Tensor | None, queries: int) -> bool:
        """Whether a mask shows to each new token all of its row up to itself, and nothing else."""
        leads = self.start - torch.from_numpy(self.before.lengths)
        if mask is None:
            return queries == 1 and not leads.any()
        total = self.start + self.keys.shape[2]
        if mask.dtype != torch.bool or mask.shape[-2:] != (queries, total):
            return False
        positions = torch.arange(total)
        own = positions <= torch.arange(total - queries, total)[:, None]
        return bool((mask == (own & (positions >= leads[:, None, None, None]))).all())


class Stored(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """Keys, or values, of a pass: decoded when something computes with them, and not before."""

    @staticmethod
    def __new__(cls, source: _Pass, side: int, _: Any) -> Any:
        new = (source.keys, source.values)[side]
        shape = list(new.shape)
        shape[2] += source.start
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)

    def __init__(
        self, source: _Pass, side: int, decode: Callable[[], tuple[Tensor, Tensor]]
    ) -> None:
        self.source, self._side, self._decode = source, side, decode

    @torch.compiler.disable
    def plain(self) -> Tensor:
        """Return the decoded tensor."""
        return self._decode()[self._side]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Stored, Stored.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


# --- attention ----------------------------------------------------------------------------------


@torch.compiler.disable
def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend to the cache as it is stored: ``attn_implementation="nsq"``.

    So it does in a layer of an `NsqCache` for passes of few tokens, once a block is sealed, where
    the mask is causal but for padding that is not stored. Everything else, the prompt first of all,
    goes to PyTorch's ``scaled_dot_product_attention``, on decoded keys and values.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.
    query, key, value : tensors, shape [batch, heads, T, head_dim]
    attention_mask : bool tensor, shape [batch, 1, queries, tokens], or None
    scaling, dropout, softcap
        As the layer has them.
    **options
        What else the layer has; of PyTorch's function.

    Returns
    -------
    output : tensor, shape [batch, queries, heads, head_dim]
    weights : None
        They are not kept.

    Raises
    ------
    ValueError
        For layers that need what neither can do: a learned sink.
    """
    if options.get("s_aux") is not None:
        raise ValueError("attn_implementation='nsq' knows no learned sinks (s_aux); use 'eager'")
    queries = query.shape[2]
    if isinstance(key, Stored) and isinstance(value, Stored) and queries <= MOST_QUERIES:
        source = key.source
        if source.sealed and source.is_causal(attention_mask, queries) and not module.training:
            return source.attended(query, scale=scaling, softcap=softcap), None
    key, value = (x.plain() if isinstance(x, Stored) else x for x in (key, value))
    if softcap is not None:
        return _capped(query, key, value, attention_mask, scaling, dropout, softcap), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return output, None


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Attend as PyTorch's function does not: with capped scores."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    scale = head_dim**-0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(rows @ key.mT * scale / softcap)
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]
    scores = scores.view(batch, kv_heads, -1, queries, tokens)
    scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    output = weights.view(batch, kv_heads, -1, tokens) @ value
    return output.view(batch, heads, queries, -1).transpose(1, 2).contiguous()


def _mask(*args: Any, config: Any = None, **options: Any) -> Tensor | None:
    """Make the mask of PyTorch's function; models that would take it for another are refused."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is not None and not hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"attn_implementation='nsq' is not for {model.__name__}, which computes its attention "
            "itself; use 'eager', which goes with NsqCache as well"
        )
    return sdpa_mask(*args, config=config, **options)


AttentionInterface.register("nsq", attention)
AttentionMaskInterface.register("nsq", _mask)


# --- arguments ----------------------------------------------------------------------------------


def _schemes(key: Any, value: Any, block_size: int | None) -> Schemes:
    """Take schemes as `KVCache` does."""
    sides = as_sides(1, 1, None, key, value, block_size)
    return sides.keys.scheme, sides.values.scheme


def _chosen(policy: Any, layers: int, block_size: int | None) -> dict[int, Schemes | None]:
    """Return the schemes of the layers that a policy names."""
    if policy is None:
        return {}
    if isinstance(policy, Mapping):
        entries = list(policy.items())
    elif isinstance(policy, Sequence) and not isinstance(policy, str):
        if len(policy) != layers:
            raise ValueError(f"policy has {len(policy)} entries; the model has {layers} layers")
        entries = list(enumerate(policy))
    else:
        raise TypeError(f"policy={policy!r:.80} is no mapping of layers, and no sequence")
    chosen: dict[int, Schemes | None] = {}
    for layer, entry in entries:
        index = as_integer("a layer of policy", layer, least=0, most=layers - 1)
        chosen[index] = None if entry is None else _pair(index, entry, block_size)
    return chosen


def _pair(index: int, entry: Any, block_size: int | None) -> Schemes:
    """Take the schemes of one layer."""
    try:
        if isinstance(entry, str):
            entry = Scheme.named(entry)
        if isinstance(entry, tuple | list) and len(entry) == 2 and None not in entry:
            return _schemes(entry[0], entry[1], block_size)
    except (TypeError, ValueError) as error:
        raise type(error)(f"policy[{index}]: {error}") from None
    raise TypeError(
        f"policy[{index}]={entry!r:.80} is no pair of schemes (key, value); None leaves the layer "
        "in floating point"
    )


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


def _left_aligned(x: Tensor, skips: list[int]) -> Tensor:
    """Return rows without their first tokens, so many of each; what follows them is anything."""
    if not any(skips):
        return x
    return torch.stack([row.roll(-skip, dims=1) for row, skip in zip(x, skips, strict=True)])


def _bytes_of(layer: Any) -> int:
    """Return what is stored of a layer, ours or transformers' own."""
    if isinstance(layer, NsqLayer):
        return 0 if layer.kv_cache is None else layer.kv_cache.nbytes
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(x.nbytes for x in held if x is not None)
