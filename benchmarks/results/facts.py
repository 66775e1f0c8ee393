"""What one reporting passage shows of codes, of distributions and of what was injected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results.measure import DATA, Say, rounded, write
from benchmarks.results.plans import Keys, biases, outliers, several
from nsq_ref.metrics import outlier_ratio
from onnx_export.evaluation.injected import changed_keys
from onnx_export.models.decoder import Decoder
from onnx_export.models.texts import REPORTING_START, passages
from onnx_export.models.tokenizer import Tokenizer

Float32 = NDArray[np.float32]
BINS = 60


def codes_of_rows(x: Float32) -> NDArray[np.int8]:
    """Return the paper's 4-bit codes with a scale a row: absmax over 7, rounded, clamped.

    Examples
    --------
    >>> codes_of_rows(np.float32([[1, -7, 3.4]]))
    array([[ 1, -7,  3]], dtype=int8)
    """
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / np.float32(7), np.float32(1e-8))
    codes: NDArray[np.int8] = np.clip(np.rint(x / scale), -7, 7).astype(np.int8)
    return codes


def run_facts(
    decoder: Decoder, tokenizer: Tokenizer, keys: Keys, say: Say, folder: Path = DATA
) -> None:
    """Measure, unless the file is there."""
    path = folder / "facts.json"
    if path.exists():
        return
    say("facts: one passage")
    (row,) = passages(tokenizer, 512, 1, start=REPORTING_START)
    _, plain, values = decoder.forward(row[None], num_logits=0)
    models = {
        "none": plain,
        "outlier-0": changed_keys(plain, outliers(keys, (0,))),
        "several-0": changed_keys(plain, several(keys, (0,))),
        "bias-all-layers": changed_keys(plain, biases(keys, tuple(range(len(keys))))),
    }
    same = {}
    for side, x in (("keys", plain), ("values", values)):
        directions = x / np.linalg.norm(x, axis=-1, keepdims=True)
        same[side] = rounded((codes_of_rows(x) == codes_of_rows(directions)).mean())
    drawn = {}
    for name, changed in models.items():
        head = changed[0, 0, 0]
        directions = head / np.linalg.norm(head, axis=-1, keepdims=True)
        drawn[name] = {"keys": _histogram(head), "directions": _histogram(directions)}
    kept: dict[str, Any] = {
        "plan": {
            "name": "facts", "texts": "reporting", "passage": 0, "tokens": 512,
            "question": "Do codes differ by norms, and what do the injected keys look like?",
        },
        "same_codes": same,
        "layer_0_head_0": drawn,
        "outlier_ratio": {
            name: [[rounded(one) for one in layer] for layer in outlier_ratio(changed[:, 0])]
            for name, changed in models.items()
        },
        "value_outlier_ratio": [[rounded(r) for r in one] for one in outlier_ratio(values[:, 0])],
    }  # fmt: skip
    write(path, kept)


def _histogram(x: Float32) -> dict[str, Any]:
    counts, edges = np.histogram(x, BINS)
    return {
        "counts": counts.tolist(), "first": rounded(edges[0]), "last": rounded(edges[-1]),
        "deviation": rounded(x.std()), "largest": [rounded(one) for one in np.abs(x).max(axis=0)],
    }  # fmt: skip
