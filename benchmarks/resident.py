"""Resident memory of the cache of SmolLM2-135M, as the system counts that of the process.

Run as ``python -m benchmarks.resident [--json FILE]``, on Linux. Each form has a process of its
own. A session there reads the text, which also brings all that a run needs besides a cache; then a
second session of the same model reads it. What the process grows by from before the second to its
end is the second's cache, made, filled by the model and held. Beside it is the arithmetic of
`Session.memory`. Static scales of GroupQueryAttention's int4 cache are any: bytes are the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.decoding import CHUNK, FLOAT, INT4, LONG, Ids, text_of
from benchmarks.timing import Row, Target, as_text, machine, parser, publish, spread
from nsq_ref import Scheme
from nsq_ref.scheme import SchemeName
from onnx_export.evaluation.resident import resident_bytes
from onnx_export.models.attention_forms import AttentionForm, GroupedAttention, QuantizedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.config import read_config
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.sources import smollm2_gguf
from onnx_export.running import Model, Session

# Of float16.
AT_MOST: dict[SchemeName, float] = {"streaming4": 0.31, "streaming3": 0.25}


def main() -> None:
    options = parsed()
    gguf = GGUFFile(smollm2_gguf())
    config = read_config(gguf)
    ids = text_of(options.tokens)[: options.tokens]
    float16 = 2 * 2 * config.layers * config.kv_heads * config.head_dim * len(ids)
    scales = np.full((config.layers, 2, config.kv_heads, config.head_dim), 0.5, np.float32)
    forms: dict[str, AttentionForm] = {FLOAT: GroupedAttention(), INT4: GroupedAttention(scales)}
    targets: dict[str, Target | None] = {FLOAT: None, INT4: None}
    for scheme_name, bound in AT_MOST.items():
        scheme = Scheme.named(scheme_name)
        forms[f"nsq {scheme_name}"] = QuantizedAttention(scheme, scheme)
        targets[f"nsq {scheme_name}"] = Target(bound, at_most=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms.items():
            build_onnx(gguf, folder, attention=form, weights="stored")
            # Not forked: a child that shares pages with this process would not count them.
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                path = Path(folder) / "model.onnx"
                grown, used = alone.apply(grown_by, (path, ids, options.threads))
            what, target = f"{name}, {len(ids)} tokens", targets[name]
            rows += [
                Row(f"{what}: {grown / 1e6:.1f} MB", spread([grown / float16]), "of float16",
                    target=target if len(ids) == LONG else None),
                Row(f"{what}: {used / 1e6:.1f} MB by arithmetic", spread([used / float16]),
                    "of float16"),
            ]  # fmt: skip
    notes = [
        f"onnxruntime {onnxruntime.__version__}, SmolLM2-135M-Instruct, one row, read in pieces of "
        f"{CHUNK}; growth of Rss in /proc/self/smaps_rollup, a process each",
        as_text(machine()),
        f"load average of the machine after: {os.getloadavg()[0]:.1f}",
    ]
    publish(options, "resident memory of the cache", rows, notes)


def parsed() -> argparse.Namespace:
    return parser("resident", __doc__, threads=2, tokens=LONG).parse_args()


def grown_by(path: Path, ids: Ids, threads: int) -> tuple[int, int]:
    """Return the bytes by which this process grows, and those of the arithmetic."""
    model = Model(path, threads=threads)
    first = read(model, ids)
    before = resident_bytes()
    second = read(model, ids)
    after = resident_bytes()
    if before is None or after is None:
        raise SystemExit("this system does not tell what of a process is resident; run it on Linux")
    del first  # held until here
    return after - before, second.memory().used


def read(model: Model, ids: Ids) -> Session:
    session = Session(model, capacity=len(ids))
    for start in range(0, len(ids), CHUNK):
        session.forward(ids[start : start + CHUNK], num_logits=0)
    return session


if __name__ == "__main__":
    main()
