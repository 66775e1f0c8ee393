"""Run a decoder of a GGUF file with ONNX Runtime, its key-value cache in NumPy arrays.

The float case of `onnx_export.running`, whose sessions run every other kind of cache.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsq_ref.arrays import as_array, as_integer, as_integer_array
from onnx_export.models.built import GRAPH_VERSION, DecoderConfig, Progress, cached_onnx
from onnx_export.models.sources import default_cache_dir, file_sha256
from onnx_export.running import Generated, Model, Session

__all__ = [
    "Decoder", "Generated", "KeyValueCache", "cached_onnx", "default_cache_dir", "file_sha256",
]  # fmt: skip

KeyValueCache = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Keys and values, each float32 ``[layers, batch, kv_heads, tokens, head_dim]``."""


class Decoder:
    """A decoder in ONNX Runtime, with its key-value cache in NumPy arrays.

    It keeps nothing of a call, so that threads may share one; a cache belongs to who holds it.

    Parameters
    ----------
    onnx_path : str or os.PathLike
        A ``model.onnx`` written by `cached_onnx`.
    threads : int, optional
        Number of threads; all cores when not given.

    Attributes
    ----------
    config : DecoderConfig
        Number of layers, heads and so on.
    model : Model
        What sessions of `onnx_export.running` run, with state and every other option.

    Raises
    ------
    ValueError
        If `threads` is not positive, or the model was not written by this package.
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> Decoder("missing.onnx")
    Traceback (most recent call last):
    FileNotFoundError: there is no ONNX model 'missing.onnx'; build it with cached_onnx
    """

    def __init__(self, onnx_path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        threads = _threads(threads)
        path = Path(onnx_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no ONNX model {str(path)!r}; build it with cached_onnx"
            )
        self.model = Model(path, threads=threads)
        self.config = _config(self.model)

    @classmethod
    def from_gguf(
        cls,
        gguf_path: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Decoder:
        """Load the decoder of a GGUF file, building its ONNX file at the first call.

        Parameters
        ----------
        gguf_path : str or os.PathLike
            A model of the llama, qwen2, qwen3 or gemma3 architecture.
        cache_dir : str or os.PathLike, optional
            Where to keep the ONNX file; `default_cache_dir` when not given.
        threads : int, optional
            Number of threads; all cores when not given.
        progress : callable, optional
            Called as ``progress(what, done, total)`` while building.

        Returns
        -------
        Decoder
            The decoder.

        Raises
        ------
        ValueError
            If the GGUF file is damaged or its model is not supported.
        OSError
            If the GGUF file cannot be read or the cache cannot be written.

        Examples
        --------
        >>> Decoder.from_gguf("missing.gguf")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'missing.gguf'
        """
        threads = _threads(threads)
        return cls(cached_onnx(gguf_path, cache_dir=cache_dir, progress=progress), threads=threads)

    def empty_cache(self, batch: int = 1) -> KeyValueCache:
        """Return the key-value cache of no tokens.

        Parameters
        ----------
        batch : int
            Number of sequences.

        Returns
        -------
        keys, values : numpy.ndarray
            Each float32 ``[layers, batch, kv_heads, 0, head_dim]``.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> folder = tempfile.mkdtemp()
        >>> decoder = Decoder.from_gguf(tiny_gguf(folder), cache_dir=folder)
        >>> keys, values = decoder.empty_cache()
        >>> keys.shape
        (2, 1, 2, 0, 8)
        """
        config = self.config
        batch = as_integer("batch", batch, least=1)
        shape = (config.layers, batch, config.kv_heads, 0, config.head_dim)
        return np.empty(shape, np.float32), np.empty(shape, np.float32)

    def forward(
        self,
        input_ids: ArrayLike,
        past: KeyValueCache | None = None,
        *,
        num_logits: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Run the decoder on new tokens, after those whose keys and values are in `past`.

        Parameters
        ----------
        input_ids : array_like of int
            New tokens, ``[batch, sequence]``.
        past : tuple of numpy.ndarray, optional
            Keys and values of the tokens before, each float32
            ``[layers, batch, kv_heads, past, head_dim]``. Not changed.
        num_logits : int, optional
            Compute logits for this many of the last tokens only; all when not given, none when 0.

        Returns
        -------
        logits : numpy.ndarray
            float32 ``[batch, sequence, vocab_size]``, or fewer positions with `num_logits`.
        keys, values : numpy.ndarray
            Cache of all tokens, float32 ``[layers, batch, kv_heads, past + sequence, head_dim]``.

        Raises
        ------
        TypeError, ValueError
            If an argument has the wrong shape, dtype or range.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> folder = tempfile.mkdtemp()
        >>> decoder = Decoder.from_gguf(tiny_gguf(folder), cache_dir=folder)
        >>> logits, keys, values = decoder.forward([[3, 1, 4, 1]])
        >>> logits.shape, keys.shape
        ((1, 4, 260), (2, 1, 2, 4, 8))
        >>> logits, keys, values = decoder.forward([[5]], past=(keys, values))
        >>> logits.shape, keys.shape
        ((1, 1, 260), (2, 1, 2, 5, 8))
        """
        tokens = self._checked_tokens(input_ids)
        batch, sequence = tokens.shape
        if past is None:
            past = self.empty_cache(batch)
        past = self._checked_past(past, batch, sequence)
        if num_logits is not None:
            num_logits = as_integer("num_logits", num_logits, least=0)
        session = Session(self.model, batch=batch)
        session.resume(
            {
                f"past_key_values.{layer}.{kind}": layer_cache
                for kind, cache in zip(("key", "value"), past, strict=True)
                for layer, layer_cache in enumerate(cache)
            }
        )
        logits = session.forward(tokens, num_logits=num_logits)
        cached = session.tensors()
        keys, values = (
            np.stack([cached[f"past_key_values.{i}.{kind}"] for i in range(self.config.layers)])
            for kind in ("key", "value")
        )
        return logits, keys, values

    def generate(
        self, input_ids: ArrayLike, max_new_tokens: int, *, stop_token: int | None = None
    ) -> Generated:
        """Continue one sequence greedily: the most likely token at every step.

        Where the model's context ends before the text does, what was generated until then is
        returned.

        Parameters
        ----------
        input_ids : array_like of int
            The prompt, ``[sequence]``.
        max_new_tokens : int
            How many tokens to generate at most.
        stop_token : int, optional
            Stop after this token.

        Returns
        -------
        Generated
            The new tokens, and why there are no more.

        Raises
        ------
        TypeError, ValueError
            If an argument has the wrong shape, dtype or range, or the prompt alone is longer than
            the context.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> folder = tempfile.mkdtemp()
        >>> decoder = Decoder.from_gguf(tiny_gguf(folder), cache_dir=folder)
        >>> tokens, ended_by = decoder.generate([3, 1, 4], 5)
        >>> tokens.shape, ended_by
        ((5,), 'max_new_tokens')
        >>> tokens, ended_by = decoder.generate([3] * 511, 5)
        >>> tokens.shape, ended_by
        ((2,), 'context_length')
        """
        prompt = self._checked_prompt(input_ids)
        most = as_integer("max_new_tokens", max_new_tokens, least=1)
        stop = None if stop_token is None else as_integer("stop_token", stop_token)
        return Session(self.model).generate(prompt, most, stop_tokens=stop)[0]

    def stream(
        self, input_ids: ArrayLike, max_new_tokens: int, *, stop_token: int | None = None
    ) -> Generator[int, None, None]:
        """Yield the tokens of `generate` one by one, as soon as each is known.

        Parameters
        ----------
        input_ids : array_like of int
            The prompt, ``[sequence]``.
        max_new_tokens : int
            How many tokens to generate at most.
        stop_token : int, optional
            Stop after this token.

        Yields
        ------
        int
            The next token; there are none beyond the end of the model's context. What was yielded
            is yours, whatever becomes of the rest.

        Raises
        ------
        TypeError, ValueError
            As `generate`, and at once.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> folder = tempfile.mkdtemp()
        >>> decoder = Decoder.from_gguf(tiny_gguf(folder), cache_dir=folder)
        >>> len(list(decoder.stream([3] * 500, 100)))
        13
        """
        prompt = self._checked_prompt(input_ids)
        most = as_integer("max_new_tokens", max_new_tokens, least=1)
        stop = None if stop_token is None else as_integer("stop_token", stop_token)
        return Session(self.model).stream(prompt, most, stop_tokens=stop)

    def _checked_prompt(self, input_ids: ArrayLike) -> NDArray[np.int64]:
        prompt = as_integer_array("input_ids", input_ids)
        if prompt.ndim != 1:
            raise ValueError(f"input_ids must have shape [sequence], got {prompt.shape}")
        tokens = self._checked_tokens(prompt[None])
        self.config.require_context(tokens.shape[1], "past and input_ids")
        return tokens

    def _checked_tokens(self, input_ids: ArrayLike) -> NDArray[np.int64]:
        tokens = as_integer_array("input_ids", input_ids)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(
                f"input_ids must have shape [batch, sequence], none of them 0, got {tokens.shape}"
            )
        self.config.require_ids(tokens, "input_ids")
        return np.ascontiguousarray(tokens, dtype=np.int64)

    def _checked_past(self, past: KeyValueCache, batch: int, sequence: int) -> KeyValueCache:
        config = self.config
        if not isinstance(past, tuple) or len(past) != 2:
            raise TypeError(f"past must be a tuple (keys, values), got {type(past).__name__}")
        past = as_array("past keys", past[0]), as_array("past values", past[1])
        for name, cache in zip(("keys", "values"), past, strict=True):
            if cache.dtype != np.float32:
                raise TypeError(f"past {name} must be a float32 array, got {cache.dtype}")
            tokens = past[0].shape[3] if past[0].ndim == 5 else 0
            expected = (config.layers, batch, config.kv_heads, tokens, config.head_dim)
            if cache.shape != expected:
                raise ValueError(
                    f"past {name} must have shape [layers, batch, kv_heads, past, head_dim] = "
                    f"{expected}, got {cache.shape}"
                )
        config.require_context(past[0].shape[3] + sequence, "past and input_ids")
        return past


def _threads(threads: int | None) -> int | None:
    return None if threads is None else as_integer("threads", threads, least=1)


def _config(model: Model) -> DecoderConfig:
    """Return the configuration that `build_onnx` stored."""
    metadata = model.session.get_modelmeta().custom_metadata_map
    if metadata.get("graph_version") != str(GRAPH_VERSION):
        raise ValueError(
            f"{model.path}: not a decoder of graph version {GRAPH_VERSION}; build it with "
            "cached_onnx"
        )
    if not all(tensor.grows for tensor in model.layout.tensors):
        raise ValueError(
            f"{model.path}: its cache is not plain float32 arrays; onnx_export.running.Session "
            "runs it"
        )
    return DecoderConfig.from_metadata(metadata)
