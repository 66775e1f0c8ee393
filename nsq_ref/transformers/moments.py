"""Second moments of a model's queries, of which feedback for its keys (F1) is made."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from nsq_ref.arrays import as_array, as_integer_array
from nsq_ref.feedback import Moments, second_moment
from nsq_ref.transformers.attending import attention, computes_itself
from nsq_ref.transformers.passes import Tensor

__all__ = ["query_moments"]

WATCHING = "nsq_moments"
TAKE_THEM = "add up nsq_ref.feedback.second_moment of queries that you take yourself"


def query_moments(model: Any, input_ids: Any, attention_mask: Any = None) -> Moments:
    """Read texts, and return the second moments of the queries of every layer.

    Queries are those that meet the keys of the cache: after the rotary embedding, and of all layers
    that use the same keys. Give text that is like what the model will read, and as many tokens
    of it as a cache will have: queries are rotated by their positions, and feedback serves
    positions like those that it is made of. Moments of several calls may be added.

    While it runs, the model has another attention function, so that no other thread may run it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder, in evaluation mode.
    input_ids : int array, shape [batch, T]
        Each row is a text, which is read by itself.
    attention_mask : array, shape [batch, T], optional
        0 for padding, on either side: it is not read.

    Returns
    -------
    Moments
        Of layers with a cache of keys, by their numbers in it, those with a sliding window
        included. ``.feedback()`` is what `NsqCache` and `nsq_ref.files.save_feedback` take.

    Raises
    ------
    TypeError
        For what is no model, and other dtypes.
    ValueError
        For other shapes, tokens that the model does not have, texts without tokens, queries that
        are not finite, a model in training mode, and models that are no decoders, have no layer
        with a cache of keys, compute their attention themselves, or compute keys from those of
        the cache, as DeepSeek does.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> one, other = torch.randint(64, (2, 1, 100))
    >>> moments = query_moments(model, one) + query_moments(model, other)
    >>> moments.layers[1].shape
    (2, 8, 8)
    >>> moments.feedback()
    {'0': Feedback(kv_heads=2, head_dim=8), '1': Feedback(kv_heads=2, head_dim=8)}
    """
    config = _text_config(model)
    texts = _texts(input_ids, attention_mask, config)
    known = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    name = "cache" if "cache" in known else "past_key_values"  # as releases call it
    found = Moments({})
    with torch.no_grad(), _watched(config):
        for text in texts:
            cache = _Watching(model.config)
            ids = torch.from_numpy(text)[None].to(model.device)
            model(ids, use_cache=True, **{name: cache}, **options)
            found += cache.found(type(model).__name__)
    return found


class _Watching(DynamicCache):
    """A cache that adds up the moments of the queries that meet its keys."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self._moments = Moments({})
        self._kept: set[int] = set()  # layers whose keys are in it

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return keys that know of what layer they are."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **options)
        self._kept.add(layer_idx)
        watched = keys.as_subclass(_Keys)
        watched.cache, watched.layer = self, layer_idx
        return watched, values

    def note(self, layer: int, queries: Tensor, kv_heads: int) -> None:
        """Add the moment of queries ``[batch, heads, T, head_dim]``."""
        try:  # every query counts alike; a weight of each would go in here
            moment = second_moment(queries.cpu(), kv_heads)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
        self._moments += Moments({layer: moment})

    def found(self, model: str) -> Moments:
        """Return the moments of all layers; ValueError where a layer's queries were not seen."""
        missing = sorted(self._kept - set(self._moments.layers))
        if missing or not self._kept:
            where = f"layer {missing[0]}: " if missing else ""
            raise ValueError(
                f"{where}no query of {model} is seen to meet the keys of its cache as they are; "
                f"{TAKE_THEM}"
            )
        return self._moments


class _Keys(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """Keys as they are, and of what layer; what is computed of them is any tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    cache: _Watching
    layer: int


@torch.compiler.disable
def _noting(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend as ever, and note which queries meet keys of a cache."""
    if isinstance(key, _Keys):
        key.cache.note(key.layer, query, key.shape[1])
        key = key.as_subclass(torch.Tensor)
    made: tuple[Tensor, None] = attention(module, query, key, value, attention_mask, **options)
    return made


AttentionInterface.register(WATCHING, _noting)
AttentionMaskInterface.register(WATCHING, sdpa_mask)


@contextlib.contextmanager
def _watched(config: Any) -> Iterator[None]:
    """Give a model the attention function that notes queries, for as long as this runs."""
    before = config._attn_implementation
    config._attn_implementation = WATCHING
    try:
        yield
    finally:
        config._attn_implementation = before


def _text_config(model: Any) -> Any:
    """Return the configuration of the decoder of a model that can be calibrated."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder with a decoder; only decoders are calibrated")
    if model.training:
        raise ValueError(f"{name} is in training mode; call model.eval()")
    if not any(isinstance(one, DynamicLayer) for one in DynamicCache(config=model.config).layers):
        raise ValueError(f"{name} has no layer with a cache of keys, so none to calibrate")
    config = model.config.get_text_config(decoder=True)
    if computes_itself(config) is not None:
        raise ValueError(
            f"{name} computes its attention itself, so that its queries are not seen; {TAKE_THEM}"
        )
    return config


def _texts(input_ids: Any, attention_mask: Any, config: Any) -> list[NDArray[np.int64]]:
    """Return the tokens of each text, without padding."""
    ids = as_integer_array("input_ids", input_ids).astype(np.int64)
    if ids.ndim != 2:
        raise ValueError(f"input_ids has shape {list(ids.shape)}; give [batch, T]")
    real = np.ones(ids.shape, bool)
    if attention_mask is not None:
        real = as_array("attention_mask", attention_mask) != 0
        if real.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {list(real.shape)}, and input_ids {list(ids.shape)}"
            )
    wrong = real & ((ids < 0) | (ids >= config.vocab_size))
    if wrong.any():
        row, at = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"input_ids[{row}, {at}] is {ids[row, at]}; the model has tokens 0 to "
            f"{config.vocab_size - 1}"
        )
    texts = [row[shown] for row, shown in zip(ids, real, strict=True) if shown.any()]
    if not texts:
        raise ValueError("input_ids has no tokens; give at least one text")
    return texts
