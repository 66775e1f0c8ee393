"""Arrays encoded with key feedback (rule F1), judged as others, but for what is coded."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref import spec
from nsq_ref.conformance.judge.encode import JudgingEncode
from nsq_ref.dtypes import Array


class JudgingFeedback(JudgingEncode):
    """The parts of an array encoded with feedback.

    What a channel is coded from, and with axis channel what its scale is made of, follows from what
    the port itself stored of the channels before it: whatever is wrong there, or another choice of
    scale (S4), makes nothing wrong behind it.
    """

    coded_late = True

    def _move(self) -> None:
        """Follow F1 along the port's own codes, scales and outliers, block by block."""
        inputs, model = self.case.inputs, self.reference.model
        self.heads = model.heads_of(inputs["order"], inputs["factor"])
        own, (scales, zeros) = self.own, self._of_scales()
        blocks = zip(
            self._of_tokens(self.direction), self._of_blocks(self.coded),
            self._of_tokens(self.norm[..., None]), self._of_tokens(own.codes), scales, zeros,
            self._of_blocks(own.outlier_index), self._of_tokens(own.outliers), strict=True,
        )  # fmt: skip
        moved = [
            [
                self._moved(feedback, *(self._of_head(part, head) for part in block))
                for head, feedback in enumerate(self.heads)
            ]
            for block in blocks
        ]
        # By block and by head; what the scales of each head are made of is asked for later.
        self.measured = [[of_head[1] for of_head in block] for block in moved]
        w, length = ([self._joined([h[i] for h in block]) for block in moved] for i in (0, 2))
        self.w = np.concatenate(w, axis=-2)
        self.length = np.concatenate(length, axis=-2)[..., 0]

    def _moved(
        self, feedback: Any, direction: Array, coded: Array, norm: Array, codes: Array,
        scale: Array, zero: Array, index: Array, outliers: Array,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Return w of a block of one head, what its scales are made of, and M2's lengths."""
        reference, norm = self.reference, norm[..., 0]
        stored = spec.Block(codes, norm, scale, zero, index, outliers, norm == 0)
        fed = reference.spec.fed_back(direction, coded, norm, feedback, self.scheme, stored)
        measured = reference.model.measured(fed, direction, coded, norm, feedback, self.scheme)
        return fed.w, measured, reference.spec.length_kept(fed, feedback)[..., None]

    def _measured_extents(self) -> list[Array]:
        coded = self._of_blocks(self.coded)
        by_head = [
            self.reference.model.extents(
                [block[head] for block in self.measured],
                [self._of_head(one, head) for one in coded], self.scheme,
            )
            for head in range(len(self.heads))
        ]  # fmt: skip
        ends = [
            [self._joined([blocks[b][side] for blocks in by_head]) for b in range(len(self.rows))]
            for side in (0, 1)
        ]
        return [np.concatenate(side, axis=-2) for side in ends]

    def _of_head(self, array: Array, head: int) -> Array:
        return np.asarray(self.reference.model.of_head(array, head, len(self.heads)))

    def _joined(self, arrays: list[Array]) -> Array:
        return np.asarray(self.reference.model.with_heads(tuple(arrays), -3))

    def _encoded(self, coded: Array) -> spec.Block:
        order, factor = self.case.inputs["order"], self.case.inputs["factor"]
        block: spec.Block = self.reference.model.blocks_with_feedback(
            coded, self.scheme, order, factor
        )
        return block
