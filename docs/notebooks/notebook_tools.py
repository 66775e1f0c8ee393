"""What the notebooks share: what a model makes of real text, bounds, claims that are checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

import nsq_ref as nsq
from nsq_ref import bounds, rounding
from nsq_ref.attention import attend
from nsq_ref.comparison import CacheRoundTrip
from nsq_ref.dtypes import Float32, Float64
from onnx_export.evaluation.fidelity import Comparison, TransformFidelity, measure_fidelity
from onnx_export.models.built import cached_onnx
from onnx_export.models.decoder import Decoder
from onnx_export.models.sources import smollm2_gguf
from onnx_export.models.texts import REPORTING_START, passages
from onnx_export.models.tokenizer import Tokenizer

_QUERY = "blk.{}.attn_q.heads.rotary"  # the graph's name of queries before the softmax scale


KEPT = Path(__file__).parents[1] / "frontier.json"
MEASURED_AGAIN = 2  # passages, each time a notebook is run
FAR = 0.002  # nats a token: processors round otherwise, by much less than schemes cost


class AttentionInputs(NamedTuple):
    """What attention sees: float32 ``[layers, heads, tokens, head_dim]``, after the rotary."""

    queries: Float32
    keys: Float32
    values: Float32


def read_real_text(tokens: int) -> AttentionInputs:
    """Let SmolLM2-135M-Instruct read a passage of an address to Congress, kept for reporting.

    Parameters
    ----------
    tokens : int
        Length of the passage.

    Returns
    -------
    AttentionInputs
        9 query heads and 3 key-value heads in each of 30 layers; three queries share one cache.
    """
    gguf = smollm2_gguf()
    path = cached_onnx(gguf)
    model = onnx.load(str(path), load_external_data=False)
    layers = sum(output.name.endswith(".key") for output in model.graph.output)
    names = [
        form.format(layer)
        for form in (_QUERY, "present.{}.key", "present.{}.value")
        for layer in range(layers)
    ]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # so that figures do not depend on the number of cores
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ids = passages(Tokenizer(gguf), tokens, 1, start=REPORTING_START)
    feeds = {
        given.name: np.empty((1, given.shape[1], 0, given.shape[3]), np.float32)
        for given in session.get_inputs()
        if given.name.startswith("past_key_values")
    }
    found = session.run(names, {"input_ids": ids, **feeds})
    queries, keys, values = (
        np.concatenate(found[start : start + layers]) for start in range(0, 3 * layers, layers)
    )
    return AttentionInputs(queries, keys, values)


def likelihoods(
    decoder: Decoder, passages: npt.NDArray[np.int64], trips: Mapping[str, CacheRoundTrip]
) -> dict[str, TransformFidelity]:
    """Return what schemes cost in likelihood, by docs/fidelity.md: 512 tokens, then 128.

    That of all passages takes minutes, and is kept in docs/frontier.json. The first two are
    measured again, and must be what is kept. With ``NSQ_MEASURE=all`` in the environment all are
    measured, and the file is written.

    Parameters
    ----------
    decoder : Decoder
    passages : int array, [passages, tokens]
    trips : mapping of str to CacheRoundTrip
        They count the passages that are measured.

    Returns
    -------
    dict of str to TransformFidelity

    Raises
    ------
    ValueError
        Where the file is of other schemes, or a likelihood is no longer what it was.
    """
    anew = os.environ.get("NSQ_MEASURE") == "all"
    chosen = passages if anew else passages[:MEASURED_AGAIN]
    measured = measure_fidelity(decoder, chosen, trips, prefill_length=512, continuation_length=128)
    found: dict[str, Any] = {
        "baseline": {"nll": next(iter(measured.values())).baseline_nll},
        "schemes": {
            name: {
                "key_scheme": trip.schemes.key.to_dict(),
                "value_scheme": trip.schemes.value.to_dict(),
                "nll": measured[name].nll,
            }
            for name, trip in trips.items()
        },
    }
    if anew:
        KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    again = "; if that is right, run this with NSQ_MEASURE=all in the environment"
    if list(kept["schemes"]) != list(found["schemes"]):
        raise ValueError(f"{KEPT.name} is of other schemes{again}")
    for name, one in {"the float32 cache": found["baseline"], **found["schemes"]}.items():
        stored = kept["schemes"].get(name, kept["baseline"])
        if any(one[side] != stored[side] for side in one if side != "nll"):
            raise ValueError(f"{name} is not the scheme of {KEPT.name}{again}")
        if len(stored["nll"]) != len(passages):
            raise ValueError(f"{KEPT.name} is of {len(stored['nll'])} passages{again}")
        off = np.abs(np.subtract(one["nll"], stored["nll"][: len(chosen)])).max()
        if not off <= FAR:
            raise ValueError(f"the likelihood with {name} is {off:.4f} off {KEPT.name}{again}")
    baseline = tuple(kept["baseline"]["nll"])
    return {
        name: TransformFidelity(tuple(one["nll"]), baseline)
        for name, one in kept["schemes"].items()
    }


def measured_and_certified(x: Float32, query: Float64) -> dict[str, tuple[Float64, Float64]]:
    """Quantize with the paper's scheme; compare the errors with what a decoder can certify.

    Parameters
    ----------
    x : float32 array, [..., T, D]
    query : array, [..., Q, D]

    Returns
    -------
    dict of str to (bound, measured)
        By the names of docs/bounds.md; of elements, of tokens, or of queries and tokens.
    """
    quantized = nsq.quantize(x, nsq.Scheme())
    sure = bounds.certificate(quantized)
    exact, x_hat = x.astype(np.float64), sure.x_hat.astype(np.float64)
    direction = exact / rounding.norm(x).astype(np.float64)[..., None]
    y = quantized.codes * quantized.scale.astype(np.float64)
    length = np.linalg.norm
    norm = length(exact, axis=-1)
    turned = exact / norm[..., None] - x_hat / length(x_hat, axis=-1, keepdims=True)
    stored = np.asarray(quantized.norm, np.float64)
    narrowing = bounds.factor_error(stored, "float16")
    return {
        "E1": (sure.direction_element, np.abs(direction - y)),
        "E2": (sure.direction_error, length(direction - y, axis=-1)),
        "E3": (sure.angle, 2 * np.arcsin(length(turned, axis=-1) / 2)),
        "E4": (sure.relative, length(exact - x_hat, axis=-1) / norm),
        "E5": (sure.element, np.abs(exact - x_hat)),
        "E6": (sure.logit(query), np.abs(query @ np.swapaxes(exact - x_hat, -1, -2))),
        "E9": (np.maximum(-narrowing.low, narrowing.high), np.abs(stored / norm - 1)),
    }


def attention_and_certified(
    queries: Float32, keys: Float32, values: Float32
) -> dict[str, tuple[Float64, Float64]]:
    """Quantize keys and values with the paper's scheme; compare attention with E7 and E8.

    Parameters
    ----------
    queries : float32 array, [batch, heads, Q, D]
        The last tokens of each sequence. Attention is causal.
    keys, values : float32 arrays, [batch, kv_heads, T, D]

    Returns
    -------
    dict of str to (bound, measured)
        ``E7``, ``E8``, and ``E8 over output``, where both are over the norm of the exact output;
        arrays of [batch, kv_heads, group * Q].
    """
    of_keys, of_values = (bounds.certificate(nsq.quantize(x)) for x in (keys, values))
    exact = attend(queries, keys, values)
    seen = attend(queries, of_keys.x_hat, of_values.x_hat)
    (batch, kv_heads, tokens, head_dim), rows = keys.shape, queries.shape[2]

    def grouped(x: Float64) -> Float64:
        return x.reshape(batch, kv_heads, -1, *x.shape[3:])

    past = np.arange(tokens) <= np.arange(tokens - rows, tokens)[:, None]
    visible = np.tile(past, (queries.shape[1] // kv_heads, 1))
    logit = of_keys.logit_interval(grouped(queries.astype(np.float64)))
    varied = bounds.total_variation(logit, softmax_scale=head_dim**-0.5, where=visible)
    apart = bounds.spread(of_values.x_hat, of_values.token, visible)
    limit = bounds.output_error(grouped(seen.weights), of_values.token, varied, apart)
    moved = grouped(np.abs(seen.weights - exact.weights).sum(axis=-1) / 2)
    off = grouped(np.linalg.norm(seen.output - exact.output, axis=-1))
    size = grouped(np.linalg.norm(exact.output, axis=-1))
    return {"E7": (varied, moved), "E8": (limit, off), "E8 over output": (limit / size, off / size)}


class Learned(NamedTuple):
    """Claims that hold, as a list that a notebook shows as Markdown."""

    claims: tuple[str, ...]

    def _repr_markdown_(self) -> str:
        return "\n".join(f"- {claim}" for claim in self.claims)


def learned(*claims: tuple[bool, str] | Comparison) -> Learned:
    """Show what was learned, if all of it holds on this data.

    Parameters
    ----------
    *claims : (bool, str) or Comparison
        Whether a claim holds, and the claim: a sentence in Markdown with the figures found. A
        comparison says by itself what holds.

    Returns
    -------
    Learned
        What the last line of a cell shows.

    Raises
    ------
    ValueError
        Naming every claim that does not hold.

    Examples
    --------
    >>> learned((2 + 2 == 4, "Two and two are 4."), (2 * 2 == 5, "Twice two is 5."))
    Traceback (most recent call last):
    ValueError: this does not hold here:
    - Twice two is 5.
    """
    pairs = [(True, str(one)) if isinstance(one, Comparison) else one for one in claims]
    refuted = [claim for holds, claim in pairs if not holds]
    if refuted:
        raise ValueError("this does not hold here:\n" + "\n".join(f"- {c}" for c in refuted))
    return Learned(tuple(claim for _, claim in pairs))
