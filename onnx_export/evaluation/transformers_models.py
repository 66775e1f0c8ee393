"""Models of transformers, as `onnx_export.evaluation.models.CausalModel` has them."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.evaluation.methods import KeyValueCache
from onnx_export.models.sources import file_sha256

with extra("transformers", __name__):
    import safetensors
    import torch
    import transformers
    from transformers.utils import logging

__all__ = ["TransformersModel"]

WEIGHTS = ("*.safetensors", "*.bin", "*.json")
ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}

FAULTS = (
    ImportError, KeyError, OSError, RuntimeError, ValueError, safetensors.SafetensorError,
)  # fmt: skip
"""What transformers raises for a folder that it cannot open; they have no class in common."""


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
        self._model = _opened(path)
        known = inspect.signature(self._model.forward).parameters
        self._cache = "cache" if "cache" in known else "past_key_values"  # as releases call it
        text = self._model.config.get_text_config()
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
        try:
            with torch.inference_mode(), _quiet():
                made = self._model(
                    input_ids=torch.tensor(input_ids),
                    use_cache=True,
                    logits_to_keep=max(wanted, 1),  # 0 means all
                    **{self._cache: cache},
                )
        except (IndexError, RuntimeError) as error:
            raise ValueError(f"{self.name}: torch does not run it: {_line(error)}") from error
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


def _opened(path: Path) -> Any:
    """Return the model of a folder, all of its weights read."""
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            _require_decoder(config)
            model, told = transformers.AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=torch.float32, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except FAULTS as error:
        raise ValueError(f"transformers does not open {path}: {_line(error)}") from error
    # Which transformers makes up.
    if missing := sorted(told["missing_keys"]) or sorted(map(str, told["mismatched_keys"])):
        raise ValueError(
            f"{path} has no weights of {missing[0]!r:.100}, as {type(model).__name__} needs; it is "
            "another kind of model, or not whole"
        )
    return model.eval()


def _require_decoder(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("it is an encoder with a decoder; only decoders are evaluated")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config.model_type} is no causal language model")
    text = config.get_text_config()
    if others := set(getattr(text, "layer_types", None) or ()) - ATTENTIONS:
        raise ValueError(
            f"it has layers of {sorted(others)[0]}, which have no cache of keys and values"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling of weights as they are read, and of defaults."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    """Return what an error says in one line, its beginning."""
    return f"{' '.join(str(error).split()):.300}"
