"""The fixtures that exporters made, run as they are and rewritten, over one text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import nsq_ref as nsq
from nsq_ref.scheme import KeyValueSchemes
from onnx_export.operators.cache_layout import CacheLayout
from tests.support.exported import session

__all__ = ["EXPORTS", "STEPS", "VOCABULARY", "Floats", "Quantized", "Text"]

Array = npt.NDArray[Any]
EXPORTS = Path(__file__).parent.parent / "onnx_export" / "rewrite" / "exports"
STEPS = (6, 1, 1, 3, 1, 1)  # a prompt, tokens, a chunk, tokens
VOCABULARY = 96
WINDOW = 8


class Text:
    """Random tokens of a batch, some rows padded on the left.

    Parameters
    ----------
    padding : list of int
        Of each row.
    seed : int
    """

    def __init__(self, padding: list[int], seed: int = 0) -> None:
        self.padding = np.array(padding)
        self.length = 0
        self._rng = np.random.default_rng(seed)

    @property
    def batch(self) -> int:
        return len(self.padding)

    def step(self, new: int) -> dict[str, Array]:
        """Return whatever a model may ask for, for so many new tokens."""
        places = np.arange(self.length, self.length + new)
        every = np.arange(self.length + new)
        feeds = {
            "input_ids": self._rng.integers(3, VOCABULARY, (self.batch, new)),
            "attention_mask": (every >= self.padding[:, None]).astype(np.int64),
            "position_ids": np.maximum(places - self.padding[:, None], 0),
            "write_indices": np.full(self.batch, self.length),
            "nonpad_kv_seqlen": np.full(self.batch, self.length + new),
            "past_lengths": np.full(self.batch, self.length),
        }
        self.length += new
        return feeds

    def real(self, new: int) -> npt.NDArray[np.bool_]:
        """Return which of the last tokens are no padding."""
        return np.arange(self.length - new, self.length) >= self.padding[:, None]


class Floats:
    """A model as it was exported."""

    def __init__(self, path: Path, batch: int) -> None:
        # Some exporters state shapes that are wrong, by which memory is shared.
        self.session = session(path, reuse=False)
        named = {"genai-phi-": 32, "genai-gptoss": 64, "genai011-llama": 8, "genai011-phi": 8}
        self.symbolic = next((n for k, n in named.items() if path.stem.startswith(k)), 16)
        self.given = {one.name: one for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.pasts = [name for name in self.given if name.startswith(("past", "key_", "value_"))]
        self.cache = {name: self._empty(name, batch) for name in self.pasts}

    def _empty(self, name: str, batch: int) -> Array:
        one = self.given[name]
        # A cache that evicts is as long as its window from the start.
        sizes = {"past_sliding_length": WINDOW}
        shape = [size if isinstance(size, int) else sizes.get(size, 0) for size in one.shape]
        shape[0] = batch
        kv_heads, channels = self.widths(name)
        if len(shape) == 4:
            shape[1], shape[3] = kv_heads, channels
        return np.zeros(shape, np.float16 if "float16" in one.type else np.float32)

    def widths(self, name: str) -> tuple[int, int]:
        """Return heads and channels of a cache; genai's have a name for channels."""
        sizes = self.given[name].shape
        if len(sizes) == 3:
            return 1, int(sizes[2])
        return int(sizes[1]), int(sizes[3]) if isinstance(sizes[3], int) else self.symbolic

    def step(self, feeds: dict[str, Array]) -> Array:
        names = {name: feeds[name] for name in self.given if name in feeds}
        made = dict(zip(self.outputs, self.session.run(None, names | self.cache), strict=True))
        for name in self.pasts:
            self.cache[name] = made[self.present(name)]
        return np.asarray(made["logits"], np.float32)

    def present(self, past: str) -> str:
        """Return the name of the output that a past comes back as."""
        if past.startswith("past_key_values"):
            return past.replace("past_key_values", "present")
        return f"updated_{past}"


class Quantized:
    """A model that was rewritten."""

    def __init__(self, path: Path, batch: int, *, native: bool, capacity: int = 64) -> None:
        self.session = session(path, native=native)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.layout = CacheLayout.from_metadata(metadata)
        self.given = {one.name: one for one in self.session.get_inputs()}
        sizes = self.layout.rounded(capacity)
        self.cache = {
            one.past: np.zeros(one.sizes(batch, sizes), np.dtype(one.dtype))
            for one in self.layout.tensors
        }

    def step(self, feeds: dict[str, Array]) -> Array:
        presents = {one.past: one.present for one in self.layout.tensors}
        names = {name: feeds[name] for name in self.given if name in feeds}
        results = self.session.run(["logits", *presents.values()], names | self.cache)
        self.cache = dict(zip(presents, results[1:], strict=True))
        return np.asarray(results[0], np.float32)

    def decoded(self, layer: int, side: str, length: int) -> Array:
        """Return what the cache of one side has of rows of a length, as nsq_ref decodes it."""
        pair: KeyValueSchemes | None = self.layout.schemes[layer]
        assert pair is not None
        scheme = pair[0 if side == "key" else 1]
        parts = {
            (one.part or "").removeprefix(f"{side}_"): self.cache[one.past]
            for one in self.layout.tensors
            if one.layer == layer and (one.part or "").startswith(side)
        }
        tail = parts.pop("tail")
        sinks = parts.pop("sinks", tail[:, :, :0])[:, :, :length]
        block = scheme.block_size or 1
        coded = (length - sinks.shape[2]) // block * block
        shape = (*tail.shape[:2], coded, tail.shape[3])
        pieces = [sinks.astype(np.float32)]
        if coded:
            given = {
                name: array[:, :, : coded // block if name in ("scale", "zero") else coded]
                for name, array in parts.items()
            }
            plain = replace(scheme, sink_tokens=0)
            stored = nsq.Quantized(scheme=plain, shape=shape, dtype=np.dtype(np.float32), **given)
            pieces.append(nsq.dequantize(stored))
        pieces.append(tail[:, :, : length - sinks.shape[2] - coded].astype(np.float32))
        return np.concatenate(pieces, axis=2)
