"""The main job on a real model: what each scheme saves, and what it costs in likelihood."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.comparison import CacheRoundTrip, round_trips
from onnx_export.evaluation.fidelity import (
    TransformFidelity,
    compare,
    measure_fidelity,
    require_lengths,
)
from onnx_export.models.built import Progress, read_config
from onnx_export.models.decoder import Decoder
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.sources import smollm2_gguf
from onnx_export.models.texts import REPORTING_START
from onnx_export.models.texts import passages as text_passages
from onnx_export.models.tokenizer import Tokenizer

PAPER = "nsep+pchan4"  # what the other schemes are compared with


@dataclass(frozen=True)
class DemoResult:
    """What ``nsq demo`` measured; it never changes, so that threads may share one.

    Attributes
    ----------
    model : str
        Name of the GGUF file.
    trips : dict of str to CacheRoundTrip
        Bytes and errors of every scheme.
    fidelity : dict of str to TransformFidelity
        Likelihoods of every scheme.
    keys : numpy.ndarray
        Keys of the first passage, float32 ``[layers, batch, kv_heads, tokens, head_dim]``.
    """

    model: str
    trips: dict[str, CacheRoundTrip]
    fidelity: dict[str, TransformFidelity]
    keys: NDArray[np.float32]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of every scheme as plain Python values, ready for JSON."""
        schemes = {}
        for name, trip in self.trips.items():
            fidelity = self.fidelity[name]
            schemes[name] = {
                **trip.to_dict(),
                "nll": list(fidelity.nll),
                "nll_change": fidelity.nll_change,
                "nll_change_error": fidelity.nll_change_error,
                "perplexity_change": fidelity.perplexity_change,
                "perplexity_change_error": fidelity.perplexity_change_error,
            }
        baseline = next(iter(self.fidelity.values()))
        return {
            "model": self.model,
            "baseline": {
                "nll": list(baseline.baseline_nll),
                "perplexity": baseline.baseline_perplexity,
            },
            "schemes": schemes,
            f"paired_with_{PAPER}": {
                name: {
                    "nll_change": compared.nll_change,
                    "nll_change_error": compared.nll_change_error,
                    "told_apart": compared.told_apart,
                    "in_words": str(compared),
                }
                for name in self.fidelity
                if name != PAPER
                for compared in [compare(self.fidelity, name, PAPER)]
            },
        }


def run_demo(
    *,
    gguf_path: str | os.PathLike[str] | None = None,
    passages: int = 16,
    prefill_length: int = 512,
    continuation_length: int = 128,
    threads: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Prefill real prose, quantize the whole cache with every scheme, score what follows.

    `onnx_export.evaluation.fidelity` says exactly what is scored, docs/fidelity.md why these
    passages: they are of the part of the texts that no scheme was chosen by.

    Parameters
    ----------
    gguf_path : str or os.PathLike, optional
        A model of the Llama family; SmolLM2-135M-Instruct when not given, fetched at first use.
    passages : int
        How many passages, at least 2.
    prefill_length, continuation_length : int
        Tokens whose cache is quantized, and tokens that are scored.
    threads : int, optional
        Threads of the model; all cores when not given.
    cache_dir : str or os.PathLike, optional
        Where models are kept; the user's cache folder when not given.
    progress : callable, optional
        Called as ``progress(what, done, total)``.

    Returns
    -------
    DemoResult

    Raises
    ------
    ConnectionError
        If the model is not in the cache and cannot be downloaded.
    ValueError
        If the model or its tokenizer is damaged or not supported, or the texts hold too few
        passages. Nothing is built then.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> folder = tempfile.mkdtemp()
    >>> result = run_demo(gguf_path=tiny_gguf(folder), passages=2, prefill_length=20,
    ...                   continuation_length=8, cache_dir=folder)
    >>> result.trips["nsep+pchan4"].bits_per_element
    6.8
    """
    require_lengths(prefill_length, continuation_length)
    if passages < 2:
        raise ValueError(f"passages must be at least 2, for a standard error, got {passages}")
    if gguf_path is None:
        if progress is not None:
            progress("fetching SmolLM2-135M-Instruct", 0, 1)
        gguf_path = smollm2_gguf(cache_dir)
    # From cheap to dear: reading takes moments, building writes gigabytes, measuring takes minutes.
    config = read_config(GGUFFile(gguf_path))
    config.require_context(prefill_length + continuation_length, "prefill and continuation")
    length = prefill_length + continuation_length + 1
    tokens = text_passages(Tokenizer(gguf_path), length, passages, start=REPORTING_START)
    config.require_ids(tokens, "passages")
    decoder = Decoder.from_gguf(gguf_path, cache_dir=cache_dir, threads=threads, progress=progress)
    trips = round_trips()
    fidelity = measure_fidelity(
        decoder, tokens, trips, prefill_length=prefill_length,
        continuation_length=continuation_length, progress=progress,
    )  # fmt: skip
    _, keys, _ = decoder.forward(tokens[:1, :prefill_length], num_logits=0)
    return DemoResult(Path(gguf_path).name, trips, fidelity, keys)
