"""Caches whose keys are sealed with feedback (rule F1) as they are not to be."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.changes import F32, Function, around, knowing_both
from nsq_ref.conformance.mistakes.reference import Mistake, Reference

FED_STREAM = ("stream_feedback",)


def _seal_plainly(original: Function, sequence: Any) -> None:
    """Seal a block without feedback."""
    feedback, sequence.feedback = sequence.feedback, None
    original(sequence)
    sequence.feedback = feedback


def _remember_waiting(original: Function, sequence: Any, tokens: Any) -> None:
    """Keep whether there were tokens in the tail when others came."""
    sequence.waited = bool(sequence.tail)
    original(sequence, tokens)


def _seal_what_waited_plainly(original: Function, sequence: Any) -> None:
    waited = vars(sequence).pop("waited", False)
    (_seal_plainly if waited else _call)(original, sequence)


def _remember_cut(original: Function, sequence: Any, length: int) -> None:
    """Keep whether a crop leaves a part of a block."""
    blocks = len(sequence.blocks)
    original(sequence, length)
    sequence.cut = len(sequence.blocks) < blocks and bool(sequence.tail)


def _seal_what_was_cut_plainly(original: Function, sequence: Any) -> None:
    cut = vars(sequence).pop("cut", False)
    (_seal_plainly if cut else _call)(original, sequence)


def _call(original: Function, sequence: Any) -> None:
    original(sequence)


def _moved(reference: Reference, sequence: Any, tokens: Any) -> Any:
    """Return tokens as feedback moves them, with the scales of all of them."""
    spec, scheme = reference.spec, sequence.scheme
    x = np.stack(tokens).astype(F32)
    norm, _ = spec.norms_and_sizes(x, scheme)
    direction = spec.direction_of(x, norm)
    coded = ~spec.mark(spec.outlier_channels(direction, scheme), x.shape[-1])
    w = spec.fed_back(direction, coded, norm, sequence.feedback, scheme).w
    return reference.rounding.saturate(w * norm[..., None], sequence.dtype)


def _with_moved_tail(original: Function, reference: Reference, sequence: Any) -> Any:
    parts = original(sequence)
    if sequence.feedback is None or not sequence.tail:
        return parts
    return {**parts, "tail": _moved(reference, sequence, sequence.tail)}


def _seal_moved(original: Function, reference: Reference, sequence: Any) -> None:
    if sequence.feedback is not None:
        sequence.tail[:] = _moved(reference, sequence, sequence.tail)
    original(sequence)


FED_CACHES = [
    Mistake("feedback only where one append fills a block", "F1",
        "a block whose first tokens waited in the tail is sealed without feedback, as by a step "
        "of decoding; all blocks are coded with it",
        FED_STREAM, {"model.append": around(_remember_waiting),
                     "model.seal": around(_seal_what_waited_plainly)}),
    Mistake("no feedback after a crop", "F1",
        "a block that was cropped is sealed again without feedback; all blocks are coded with it",
        FED_STREAM, {"model.crop": around(_remember_cut),
                     "model.seal": around(_seal_what_was_cut_plainly)}),
    Mistake("feedback in the tail", "F1",
        "tokens of the tail are moved by feedback; they are kept as they came until they are coded",
        FED_STREAM, {"model.stored": knowing_both(_with_moved_tail)}),
    Mistake("feedback applied twice", "F1",
        "tokens that feedback has moved are sealed with feedback; it is to be applied once",
        FED_STREAM, {"model.seal": knowing_both(_seal_moved)}),
]  # fmt: skip
