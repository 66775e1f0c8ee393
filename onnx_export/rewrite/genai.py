"""What onnxruntime-genai must be told to run a model with a cache in buffers.

Its own loop gives every cache of a model one dtype, one shape a layer and zeros at the start, and
feeds token ids, a mask and positions. Where the model states all axes but the batch of a past, as
one of buffers does, it allocates just that, once, for past and present (measured with 0.18). What
is told in ``genai_config.json`` is where the model and the library are, and how long a text may be.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from nsq_ref.arrays import as_integer
from nsq_ref.extras import extra
from nsq_ref.files import atomic

with extra("onnx", __name__):
    import onnx

__all__ = ["CONFIG", "Context"]

CONFIG = "genai_config.json"
# Of a tokenizer, as the model builder puts them beside a model.
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "chat_template*", "config.json", "generation_config.json",
)  # fmt: skip


class Context:
    """How many tokens buffers have room for, and the files that say so to onnxruntime-genai.

    Parameters
    ----------
    folder : Path
        Of the model.
    target : Path
        The file that is written.
    length : int, optional
        Tokens; by default what the model says.

    Raises
    ------
    TypeError, ValueError
        For a length that is none, a configuration that is none, and a target beside the model's own
        configuration.
    """

    def __init__(self, folder: Path, target: Path, length: int | None) -> None:
        self._folder, self._target = folder, target
        self._asked = None if length is None else as_integer("context_length", length, least=1)
        self._config = _read(folder / CONFIG)
        if self._config is not None:
            if target.parent.exists() and os.path.samefile(target.parent, folder):
                raise ValueError(
                    f"{target} is beside {folder / CONFIG}, which is of the model as it was; write "
                    "into another folder"
                )
            self._decoder = _entry(self._config, "model", "decoder")
            self._require_cpu()

    def length(self, positions: int | None) -> int:
        """Return the tokens, at most those that the model has positions for."""
        known = [] if positions is None else [positions]
        if self._config is not None:
            stated = _entry(self._config, "model").get("context_length")
            if stated is not None:
                known.append(as_integer(f"{CONFIG}: context_length", stated, least=1))
        if self._asked is None:
            if not known:
                raise ValueError(
                    "the model does not say how many tokens it has positions for; give "
                    "context_length (--context), for which buffers have room"
                )
            return min(known)
        if known and self._asked > min(known):
            raise ValueError(f"context_length={self._asked}; the model has {min(known)} positions")
        return self._asked

    def beside(
        self, model: onnx.ModelProto, stays: list[str], library: Path | None, length: int
    ) -> list[tuple[Path, atomic.Content]]:
        """Return what is written beside the model; nothing where no configuration is.

        Raises
        ------
        ValueError
            For a model that onnxruntime-genai cannot run, with the reason.
        """
        if self._config is None:
            return []
        if stays:
            raise ValueError(
                f"{stays[0]} stays as it is, and onnxruntime-genai gives all caches one dtype; "
                "rewrite every layer, or take cache='tensors'"
            )
        decoder = self._decoder
        names = {key: str(name) for key, name in _entry(decoder, "inputs").items()}
        fed = {names.get(role, role) for role in ("input_ids", "attention_mask", "position_ids")}
        fed |= {one.name for one in model.graph.initializer}  # optional inputs keep these
        for one in model.graph.input:
            kind = one.type.tensor_type.elem_type
            if one.name not in fed and kind != onnx.TensorProto.UINT8:
                raise ValueError(
                    f"the model has an input {one.name!r}, which onnxruntime-genai does not feed; "
                    "take cache='tensors', or an export with an attention mask"
                )
        decoder["filename"] = self._target.name
        options = _section(decoder, "session_options")
        options["custom_ops_library"] = library.name if library else ""
        # The operator knows of windows; the loop shall keep all tokens.
        decoder.pop("sliding_window", None)
        self._config["model"]["context_length"] = length
        search = _section(self._config, "search")
        stated = as_integer(f"{CONFIG}: max_length", search.get("max_length", length), least=0)
        search["max_length"] = min(stated or length, length)
        search["past_present_share_buffer"] = True
        content = json.dumps(self._config, indent=4).encode()
        files: list[tuple[Path, atomic.Content]] = [(self._target.with_name(CONFIG), content)]
        for path in sorted({one for name in TOKENIZER for one in self._folder.glob(name)}):
            if path.is_file():
                files.append((self._target.with_name(path.name), partial(_copy, path)))
        return files

    def _require_cpu(self) -> None:
        for one in _section(self._decoder, "session_options").get("provider_options") or []:
            for provider in one:
                if str(provider).lower() != "cpu":
                    raise ValueError(
                        f"{self._folder / CONFIG} asks for the provider {provider}, and nsq's "
                        "library runs on the CPU; remove it from provider_options"
                    )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no configuration of onnxruntime-genai: it is no object")
    return config


def _entry(config: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        found = config.get(name)
        if not isinstance(found, dict):
            raise ValueError(f"{CONFIG} has no object {name!r}, as that of a decoder has")
        config = found
    return config


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object that may be left out; then it is made."""
    found = config.setdefault(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG} is none of onnxruntime-genai: {name!r} is no object")
    return found


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
