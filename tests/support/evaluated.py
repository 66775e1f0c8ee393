"""Models that count what they read and fail when told, and codecs that kill who runs them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nsq_ref.rivals import Codec
from nsq_ref.rivals.codec import Part, Parts, Values

__all__ = ["Counting", "Killing"]


class Counting:
    """A model of which every call is counted; it fails at one of them."""

    def __init__(self, model: Any, fails_at: int | None = None) -> None:
        self.model, self.fails_at = model, fails_at
        self.calls = 0
        self.name, self.fingerprint = model.name, model.fingerprint
        self.vocab_size, self.context_length = model.vocab_size, model.context_length

    def forward(self, input_ids: Any, past: Any = None, *, num_logits: Any = None) -> Any:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.model.forward(input_ids, past, num_logits=num_logits)


@dataclass(frozen=True)
class Killing(Codec):
    """Stores values as they are; where there is a file to be killed by, it kills the process."""

    files: str
    once: bool = True  # the file goes

    def encode(self, x: np.ndarray) -> Parts:
        for path in Path(self.files).glob("kill*"):
            if self.once:
                path.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": Part(x, 32)}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(parts["x"], np.float32) / 2
