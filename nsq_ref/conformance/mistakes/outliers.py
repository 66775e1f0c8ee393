"""Wrong outlier channels (rule O1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.changes import ENCODE, F64, Function, around, instead, place
from nsq_ref.conformance.mistakes.reference import Change
from nsq_ref.scheme import Scheme

_channels = place("spec.outlier_channels", "O1", ENCODE)
_extent = place("spec.extent", "O1", ENCODE)


def _ranked_by(rank: Function) -> Change:
    """Take the channels that are the first by another ``rank(direction)``."""

    def index(direction: Any, scheme: Scheme) -> Any:
        largest = np.argsort(-rank(direction), axis=-1, kind="stable")
        return np.sort(largest[..., : scheme.outlier_channels], axis=-1).astype(np.int32)

    return instead(index)


def _later_of_equals(direction: Any, scheme: Scheme) -> Any:
    peak = np.max(np.abs(direction), axis=-2, keepdims=True)
    order = np.argsort(peak, axis=-1, kind="stable")[..., ::-1]
    return np.sort(order[..., : scheme.outlier_channels], axis=-1).astype(np.int32)


def _by_magnitude(direction: Any, scheme: Scheme) -> Any:
    peak = np.max(np.abs(direction), axis=-2, keepdims=True)
    largest = np.argsort(-peak, axis=-1, kind="stable")
    return largest[..., : scheme.outlier_channels].astype(np.int32)


def _in_extent(axis: str) -> Change:
    """Let outlier channels have part in the extents of schemes of this axis."""

    def extent(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
        return original(direction, coded | (scheme.axis == axis), scheme)

    return around(extent)


OUTLIERS = [
    _channels("outliers by their mean", "outlier channels are those of the largest mean magnitude",
        _ranked_by(lambda d: np.mean(np.abs(d), axis=-2, keepdims=True, dtype=F64))),
    _channels("outliers by their length",
        "outlier channels are those of the largest sum of squares",
        _ranked_by(lambda d: np.sum(np.square(d, dtype=F64), axis=-2, keepdims=True))),
    _channels("outliers by their value",
        "outlier channels are those of the largest value, sign and all",
        _ranked_by(lambda d: np.max(d, axis=-2, keepdims=True))),
    _channels("later of equal outlier channels",
        "of equal channels the one of the higher index is kept", instead(_later_of_equals)),
    _channels("outlier channels by size",
        "outlier channels are in order of size; they are ascending", instead(_by_magnitude)),
    _extent("outliers in the range", "outlier channels enter the scale of their token",
        _in_extent("token")),
    _extent("scales of outlier channels",
        "outlier channels have scales; with axis channel these are to be 0",
        _in_extent("channel")),
    place("spec.without_codes", "O1", ENCODE)("codes of outlier channels",
        "outlier channels have codes; these are to be 0",
        instead(lambda codes, coded, norm: (
            np.where(norm[..., None] != 0, codes, 0).astype(np.int16)))),
]  # fmt: skip
