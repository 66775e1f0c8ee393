"""Tokens a second of SmolLM2-135M with each form of its cache, and what the loop itself costs.

Run as ``python -m benchmarks.decoding [--json FILE]``. Forms take turns, a step each; ratios are
taken round by round. All read the same text; its keys and values are what the static scales of
GroupQueryAttention's int4 cache are taken from. Needs ONNX Runtime 1.27 and about 4 GB on disk.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from benchmarks.timing import (
    Case,
    Row,
    Target,
    Timed,
    as_text,
    interleaved,
    machine,
    report,
    spread,
    write_json,
)
from nsq_ref import Scheme
from nsq_ref.scheme import SchemeName
from onnx_export.models.attention_forms import (
    AttentionForm,
    GroupedAttention,
    PlainAttention,
    QuantizedAttention,
)
from onnx_export.models.built import build_onnx
from onnx_export.models.calibration import static_scales
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.sources import smollm2_gguf
from onnx_export.models.texts import ADDRESSES, read_address
from onnx_export.models.tokenizer import Tokenizer
from onnx_export.running import Model, Sampling, Session

Ids = npt.NDArray[np.int64]

FLOAT, INT4, COPIED = "GQA float32", "GQA int4", "GQA int4, copied"
CHUNK = 512  # tokens of a prefill that are read at once
FASTER_LONG = {FLOAT: 1.5, COPIED: 1.5, INT4: 1.2}
LONG = 8192
OVERHEAD = 0.05


def main() -> None:
    options = parsed()
    ids = text_of(max(options.tokens))
    rows: list[Row] = []
    notes = [
        f"onnxruntime {onnxruntime.__version__}, SmolLM2-135M-Instruct with float32 weights, one "
        f"row, {options.threads} threads, {options.rounds} rounds, a step each in turn",
        as_text(machine()),
        f"load average of the machine before: {os.getloadavg()[0]:.1f}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        sessions = sessions_of(options.forms, Path(folder), ids, options.threads)
        for tokens in sorted(options.tokens):
            # The steps themselves are among the tokens, and the last of them are the context's.
            until = tokens - 4 * options.rounds if tokens == LONG else tokens
            for session in sessions.values():
                for start in range(session.lengths[0], until, CHUNK):
                    session.forward(ids[start : min(start + CHUNK, until)])
            rows += at(sessions, tokens, ids[until:], options.rounds)
        rows += overheads(sessions, options.rounds)
        notes += [f"{name}: cache of {session.memory()}" for name, session in sessions.items()]
    notes.append(f"load average after: {os.getloadavg()[0]:.1f}")
    report("decoding", rows, notes)
    if options.json is not None:
        write_json(options.json, rows, notes, threads=options.threads)


def parsed() -> argparse.Namespace:
    names = ["plain", "gqa", "gqa-int4", "streaming4", "streaming3"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, LONG])
    parser.add_argument("--forms", nargs="+", choices=names, default=names)
    return parser.parse_args()


def text_of(tokens: int) -> Ids:
    """Return so many tokens of prose, and some more."""
    tokenizer, ids = Tokenizer(smollm2_gguf()), np.empty(0, np.int64)
    for name in ADDRESSES * 9:
        ids = np.concatenate([ids, tokenizer.encode(read_address(name))])
        if len(ids) > tokens + CHUNK:
            break
    return ids


def sessions_of(names: list[str], folder: Path, ids: Ids, threads: int) -> dict[str, Session]:
    """Build the forms that were asked for, and open each."""
    gguf = GGUFFile(smollm2_gguf())

    def opened(name: str, form: AttentionForm, *, copied: bool = False) -> Session:
        path = folder / name / "model.onnx"
        if not path.exists():
            build_onnx(gguf, path.parent, attention=form)
        model = Model(path, threads=threads)
        model.in_place &= not copied
        return Session(model)

    sessions = {}
    if "plain" in names:
        sessions["plain float32"] = opened("plain", PlainAttention())
    if {"gqa", "gqa-int4"} & set(names):
        sessions[FLOAT] = opened("gqa", GroupedAttention())
    if "gqa-int4" in names:
        form = GroupedAttention(static_scales(sessions[FLOAT], ids))
        sessions[INT4] = opened("gqa-int4", form)
        sessions[COPIED] = opened("gqa-int4", form, copied=True)
    schemes: list[SchemeName] = ["streaming4", "streaming3"]
    for scheme in schemes:
        if scheme in names:
            one = Scheme.named(scheme)
            sessions[f"nsq {scheme}"] = opened(scheme, QuantizedAttention(one, one))
    return sessions


def at(sessions: dict[str, Session], tokens: int, ids: Ids, rounds: int) -> list[Row]:
    """Time a step of each at so many tokens."""
    following = {name: iter(ids.tolist()) for name in sessions}
    cases = [
        Case(name, partial(step, session, following[name])) for name, session in sessions.items()
    ]
    timed = interleaved(cases, rounds, settle=1e-9)  # one step before each
    rows = []
    for name, case in timed.items():
        speed = spread(1 / case.seconds)
        what = f"{name}, {tokens} tokens"
        rows.append(Row(what, speed, "tokens a second", spread(case.seconds), cores=case.cores))
    for name in sessions:
        if name.startswith("nsq"):
            rows += compared(name, timed, tokens)
    return rows


def step(session: Session, following: Any) -> None:
    session.forward([next(following)])


def compared(name: str, timed: dict[str, Timed], tokens: int) -> list[Row]:
    rows = []
    for other, bound in FASTER_LONG.items():
        if other in timed:
            ratio = spread(timed[other].seconds / timed[name].seconds)
            target = Target(bound if tokens == LONG else 1.0)
            rows.append(Row(f"{name}, {tokens} tokens", ratio, f"as fast as {other}", None, target))
    return rows


def overheads(sessions: dict[str, Session], rounds: int) -> list[Row]:
    """Tell how long a step of the loop is outside of the run that it makes, at 128 tokens."""
    rows = []
    for name, filled in sessions.items():
        session = filled.fork()
        session.crop(128)
        inside: list[float] = []
        with clocked(session.model, inside):
            stream = session.stream([1], rounds + 2, sampling=Sampling())
            moments = [time.perf_counter() for _ in stream]
        # From one token to the next there is one run, the one before the later of them.
        outside = np.diff(moments)[1:] - inside[2:]
        share = spread(outside / np.array(inside[2:]))
        rows.append(
            Row(f"the loop around {name}, 128 tokens", share, "of the run", spread(outside),
                Target(OVERHEAD, at_most=True))
        )  # fmt: skip
    return rows


@contextmanager
def clocked(model: Model, seconds: list[float]) -> Any:
    """Note how long each run of a model takes."""
    run: Callable[..., Any] = model.session.run_with_iobinding

    def timed(binding: onnxruntime.IOBinding) -> None:
        start = time.perf_counter()
        run(binding)
        seconds.append(time.perf_counter() - start)

    model.session.run_with_iobinding = timed
    try:
        yield
    finally:
        model.session.run_with_iobinding = run


if __name__ == "__main__":
    main()
