"""Run a decoder of a GGUF file with ONNX Runtime, its key-value cache in NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsq_ref.arrays import as_array, as_integer, as_integer_array
from nsq_ref.extras import extra
from onnx_export.models.built import GRAPH_VERSION, DecoderConfig, Progress, cached_onnx
from onnx_export.models.sources import default_cache_dir, file_sha256

with extra("onnx", __name__):
    import onnxruntime

__all__ = [
    "Decoder", "Generated", "KeyValueCache", "cached_onnx", "default_cache_dir", "file_sha256",
]  # fmt: skip

KeyValueCache = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Keys and values, each float32 ``[layers, batch, kv_heads, tokens, head_dim]``."""


class Generated(NamedTuple):
    """What `Decoder.generate` returns, for any thread.

    ``tokens`` are the new ones only, int64 ``[new_tokens]``, at least one, a stop token included.
    ``ended_by`` says why there are no more: the ``stop_token`` was generated, there are
    ``max_new_tokens``, or the model's context is full (``context_length``).
    """

    tokens: NDArray[np.int64]
    ended_by: Literal["stop_token", "max_new_tokens", "context_length"]


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
        options = onnxruntime.SessionOptions()
        # Zero lets the runtime use every core.
        options.intra_op_num_threads = threads or 0
        # Errors only: the runtime warns of every optional input, and `num_logits` is one.
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.config = _config(path, self._session.get_modelmeta().custom_metadata_map)
        self._outputs = [output.name for output in self._session.get_outputs()]

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
            A model of the llama or qwen2 architecture.
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
        feeds: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {"input_ids": tokens}
        if num_logits is not None:
            feeds["num_logits"] = np.array(as_integer("num_logits", num_logits, least=0), np.int64)
        for kind, cache in zip(("key", "value"), past, strict=True):
            for layer, layer_cache in enumerate(cache):
                feeds[f"past_key_values.{layer}.{kind}"] = np.ascontiguousarray(layer_cache)
        results = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        keys, values = (
            np.stack([results[f"present.{layer}.{kind}"] for layer in range(self.config.layers)])
            for kind in ("key", "value")
        )
        return results["logits"], keys, values

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
        max_new_tokens, stop_token = _limits(max_new_tokens, stop_token)
        tokens = np.fromiter(
            self.stream(input_ids, max_new_tokens, stop_token=stop_token), np.int64
        )
        if stop_token is not None and tokens[-1] == stop_token:
            return Generated(tokens, "stop_token")
        return Generated(
            tokens, "max_new_tokens" if len(tokens) == max_new_tokens else "context_length"
        )

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
        prompt = as_integer_array("input_ids", input_ids)
        if prompt.ndim != 1:
            raise ValueError(f"input_ids must have shape [sequence], got {prompt.shape}")
        max_new_tokens, stop_token = _limits(max_new_tokens, stop_token)
        tokens = self._checked_tokens(prompt[None])
        self.config.require_context(tokens.shape[1], "past and input_ids")
        # The last token of all is not read, so that it needs no place in the context.
        room = self.config.context_length - len(prompt) + 1
        return self._generated(tokens, min(max_new_tokens, room), stop_token)

    def _generated(
        self, tokens: NDArray[np.int64], count: int, stop_token: int | None
    ) -> Generator[int, None, None]:
        past = self.empty_cache()
        for _ in range(count):
            logits, keys, values = self.forward(tokens, past, num_logits=1)
            past = keys, values
            token = int(logits[0, -1].argmax())
            yield token
            if token == stop_token:
                break
            tokens = np.array([[token]])

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


def _limits(max_new_tokens: int, stop_token: int | None) -> tuple[int, int | None]:
    """Return where `Decoder.generate` and `Decoder.stream` end, as Python integers."""
    if stop_token is not None:
        stop_token = as_integer("stop_token", stop_token)
    return as_integer("max_new_tokens", max_new_tokens, least=1), stop_token


def _config(path: Path, metadata: Mapping[str, str]) -> DecoderConfig:
    """Return the configuration that `build_onnx` stored."""
    if metadata.get("graph_version") != str(GRAPH_VERSION):
        raise ValueError(
            f"{path}: not a decoder of graph version {GRAPH_VERSION}; build it with cached_onnx"
        )
    return DecoderConfig.from_metadata(metadata)
