"""Norms and principal components of keys, values and hidden states, of two kinds of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results.encoder import Encoder, encoder_folder
from benchmarks.results.measure import DATA, Say, rounded, write
from nsq_ref.metrics import outlier_ratio
from nsq_ref.rivals import entry
from onnx_export.models.decoder import Decoder
from onnx_export.models.texts import ADDRESSES, REPORTING_START, passages, read_address
from onnx_export.models.tokenizer import Tokenizer

Float32 = NDArray[np.float32]

METHODS = (
    "naive4", "nsep4", "pchan4", "nsep+pchan4", "streaming4", "naive3", "pchan3", "nsep+pchan3",
    "naive2", "pchan2", "nsep+pchan2",
)  # fmt: skip
START, TOKENS = 1500, 256  # of the encoder's own tokens; the model reads 256 at most
TOLD = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
PUBLISHED = (0.6660, 0.1046, 0.1411)  # their similarities, in the model's documentation


def structure(x: Float32) -> dict[str, float]:
    """Return what norms and the first principal component are of rows, ``[tokens, channels]``.

    Examples
    --------
    >>> x = np.outer([1, 2, 4], [3, 4]).astype(np.float32)  # only norms differ
    >>> found = structure(x)
    >>> round(found["pc1"], 3), round(found["pc1_norm"], 3), found["norm_ratio"]
    (1.0, 1.0, 4.0)
    """
    wide = x.astype(np.float64)
    norm = np.linalg.norm(wide, axis=1)
    share, scores = _first_component(wide)
    directions, _ = _first_component(wide / np.where(norm > 0, norm, 1)[:, None])
    spread = scores.std() * norm.std()
    related = (
        abs(((scores - scores.mean()) * (norm - norm.mean())).mean() / spread) if spread else 0
    )
    return {
        "pc1": share, "pc1_of_directions": directions, "pc1_norm": float(related),
        "norm_variation": float(norm.std() / norm.mean()),
        "norm_ratio": float(norm.max() / norm.min()),
    }  # fmt: skip


def _first_component(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    centred = x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    total = float(values.sum())
    return (float(values[-1]) / total if total > 0 else 0.0), centred @ vectors[:, -1]


def run_structure(decoder: Decoder, tokenizer: Tokenizer, say: Say, folder: Path = DATA) -> None:
    """Measure both models, unless the file is there: it takes a minute."""
    path = folder / "structure.json"
    if path.exists():
        return
    encoder = Encoder(encoder_folder())
    vectors = [encoder.forward(encoder.encode(text))[0] for text in TOLD]
    told = [float(vectors[i] @ vectors[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    texts = [encoder.encode(read_address(name))[1:-1][START:] for name in ADDRESSES]
    rows = [ids[: TOKENS - 2] for ids in texts if len(ids) >= TOKENS - 2]
    first, last = encoder.encode("")
    found: dict[str, list[dict[str, float]]] = {}
    outputs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for number, ids in enumerate(rows):
        say(f"structure: encoder, passage {number + 1}/{len(rows)}")
        read = [first, *ids, last]
        cache: list[tuple[Float32, Float32]] = []

        def keep(layer: int, keys: Float32, values: Float32) -> tuple[Float32, Float32]:
            cache.append((keys, values))  # noqa: B023  called within the loop
            return keys, values

        exact, states = encoder.forward(read, keep)
        for layer, (keys, values) in enumerate(cache):
            _add(found, f"encoder keys {layer}", keys)
            _add(found, f"encoder values {layer}", values)
        for layer, state in enumerate(states):
            _add(found, f"encoder states {layer}", state[None])
        for name in METHODS:
            one = entry(name)

            def lossy(layer: int, keys: Float32, values: Float32) -> tuple[Float32, Float32]:
                return one.key(keys).x_hat, one.value(values).x_hat  # noqa: B023  the same

            embedding, lossy_states = encoder.forward(read, lossy)
            error = np.linalg.norm(lossy_states[-1] - states[-1]) / np.linalg.norm(states[-1])
            outputs[name].append(
                {"embedding": rounded(1 - exact @ embedding), "states": rounded(error)}
            )
    for number, row in enumerate(passages(tokenizer, 512, 4, start=REPORTING_START)):
        say(f"structure: decoder, passage {number + 1}/4")
        _, all_keys, all_values = decoder.forward(row[None], num_logits=0)
        for layer in range(len(all_keys)):
            _add(found, f"decoder keys {layer}", all_keys[layer, 0])
            _add(found, f"decoder values {layer}", all_values[layer, 0])
    kept: dict[str, Any] = {
        "plan": {
            "name": "structure", "texts": "reporting",
            "question": "What do norms and the first component tell, before and after a norm?",
            "encoder": f"all-MiniLM-L6-v2, tokens {START} to {START + TOKENS - 2} of an address",
            "decoder": "SmolLM2-135M-Instruct, 512 tokens",
        },
        "similarities": {"measured": [rounded(one) for one in told], "published": PUBLISHED},
        "structure": {
            name: {figure: rounded(np.mean([one[figure] for one in every])) for figure in every[0]}
            for name, every in found.items()
        },
        "passages": {"encoder": len(rows), "decoder": 4},
        "outputs": outputs,
    }  # fmt: skip
    write(path, kept)


def _add(found: dict[str, list[dict[str, float]]], name: str, heads: Float32) -> None:
    """Add the mean over heads of a passage."""
    ratios = outlier_ratio(heads)
    every = [structure(head) | {"ratio": float(r)} for head, r in zip(heads, ratios, strict=True)]
    mean = {figure: float(np.mean([one[figure] for one in every])) for figure in every[0]}
    found.setdefault(name, []).append(mean)
