"""Arrays encoded with key feedback (rule F1), judged as others, but for what is coded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nsq_ref import spec
from nsq_ref.conformance.judge.arrays import bits_of
from nsq_ref.conformance.judge.encode import JudgingEncode
from nsq_ref.dtypes import Array


class JudgingFeedback(JudgingEncode):
    """The parts of an array encoded with feedback.

    Of each token only the first wrong code or outlier counts, in the order of coding: its error
    has moved on, and what follows may be right for that.
    """

    coded_late = True

    def _under_feedback(
        self, function: Callable[..., Array], direction: Array, *known: Array
    ) -> Array:
        """Apply a function of F1 to a block, head by head."""
        model = self.reference.model
        heads = model.heads_of(self.case.inputs["order"], self.case.inputs["factor"])
        moved: list[Any] = []
        for head, feedback in enumerate(heads):
            d, s, z, c, n = (
                model.of_head(array, head, len(heads)) for array in (direction, *known)
            )
            moved.append(function(d, s, z, c, n[..., 0], feedback, self.scheme))
        return np.asarray(model.with_heads(tuple(moved), -3))

    def _first_wrong(
        self, codes: Array, outliers: Array, own: spec.Block, index: Array
    ) -> tuple[Array, Array]:
        order = self.case.inputs["order"]
        places = np.argsort(order, axis=-1)[:, None] if len(order) > 1 else np.argsort(order)
        places = np.broadcast_to(places, codes.shape)
        last = codes.shape[-1]
        code_at = np.where(own.codes != codes, places, last)
        outlier_at = np.where(
            bits_of(own.outliers) != bits_of(outliers),
            np.take_along_axis(places, index, axis=-1), last,
        )  # fmt: skip
        found = [at.min(axis=-1, keepdims=True, initial=last) for at in (code_at, outlier_at)]
        first = np.minimum(*found)
        return (
            np.where((code_at == first) & (first < last), own.codes, codes),
            np.where((outlier_at == first) & (first < last), own.outliers, outliers),
        )

    def _encoded(self, coded: Array) -> spec.Block:
        order, factor = self.case.inputs["order"], self.case.inputs["factor"]
        block: spec.Block = self.reference.model.blocks_with_feedback(
            coded, self.scheme, order, factor
        )
        return block
