"""Models of transformers, as `onnx_export.evaluation.models.CausalModel` has them."""

from __future__ import annotations

import hashlib
import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.evaluation.methods import KeyValueCache
from onnx_export.models.sources import file_sha256

with extra("transformers", __name__):
    import torch
    import transformers

__all__ = ["TransformersModel"]

WEIGHTS = ("*.safetensors", "*.bin", "*.json")
ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}


class TransformersModel:
    """A causal language model of transformers in float32, its weights from a folder.

    All layers get a cache that only grows; a sliding window is then a mask over it.

    Parameters
    ----------
    folder : str or os.PathLike
        With ``config.json`` and weights; nothing is fetched.
    threads : int, optional
        Of torch, for the whole process; all cores when not given.

    Raises
    ------
    ValueError
        If it is no causal model with a cache of keys and values.
    """

    def __init__(self, folder: str | os.PathLike[str], *, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        path = Path(folder)
        try:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, local_files_only=True
            ).eval()
        except OSError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        known = inspect.signature(self._model.forward).parameters
        self._cache = "cache" if "cache" in known else "past_key_values"  # as releases call it
        text = self._model.config.get_text_config()
        others = set(getattr(text, "layer_types", None) or ()) - ATTENTIONS
        if others:
            raise ValueError(
                f"{path} has layers of {sorted(others)[0]}, which have no cache of keys and values"
            )
        self.name = path.name
        self.vocab_size: int | None = text.vocab_size
        self.context_length: int | None = getattr(text, "max_position_embeddings", None)
        files = sorted(one for pattern in WEIGHTS for one in path.glob(pattern))
        said = [f"{one.name} {file_sha256(one)}" for one in files]
        self.fingerprint = hashlib.sha256("\n".join(said).encode()).hexdigest()

    def forward(
        self,
        input_ids: NDArray[np.int64],
        past: KeyValueCache | None = None,
        *,
        num_logits: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Read tokens, as `CausalModel` says."""
        cache = transformers.DynamicCache()
        if past is not None and past[0].shape[3]:
            for layer, (keys, values) in enumerate(zip(*past, strict=True)):
                cache.update(torch.tensor(keys), torch.tensor(values), layer)
        wanted = input_ids.shape[1] if num_logits is None else num_logits
        with torch.inference_mode():
            made = self._model(
                input_ids=torch.tensor(input_ids),
                use_cache=True,
                logits_to_keep=max(wanted, 1),  # 0 means all
                **{self._cache: cache},
            )
        logits = made.logits[:, made.logits.shape[1] - wanted :]
        return logits.numpy(), self._stacked(cache, "keys"), self._stacked(cache, "values")

    def _stacked(self, cache: Any, side: str) -> NDArray[np.float32]:
        layers: list[Any] = [getattr(layer, side, None) for layer in cache.layers]
        if not all(isinstance(layer, torch.Tensor) for layer in layers) or not layers:
            raise ValueError(f"{self.name} has no cache of keys and values in every layer")
        if shapes := {tuple(one.shape) for one in layers} - {tuple(layers[0].shape)}:
            raise ValueError(
                f"{self.name}: layers of its cache differ, {tuple(layers[0].shape)} and "
                f"{shapes.pop()}; only layers that are alike are evaluated"
            )
        stacked: NDArray[np.float32] = torch.stack(layers).numpy()
        return stacked
