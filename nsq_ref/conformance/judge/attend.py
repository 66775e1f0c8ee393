"""Attention, judged against float64 over the decoded arrays, within the tolerance of rule A3."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.codec import Quantized
from nsq_ref.conformance.judge.arrays import text_of
from nsq_ref.conformance.judge.stages import Judging
from nsq_ref.conformance.operations import attention_options, stored_side
from nsq_ref.scheme import Field, Scheme


class JudgingAttend(Judging):
    """The outputs of attention."""

    def stages(self) -> None:
        """Judge structure and outputs."""
        inputs, spec = self.case.inputs, self.reference
        query = inputs["query"]
        sides = stored_side(self.case, "keys"), stored_side(self.case, "values")
        keys, values = spec.model.decode_sides(*sides)
        key_parts, value_parts = (_quantized(*side) for side in sides)
        options = attention_options(inputs)
        shape = (*query.shape[:2], values.shape[-1])
        got = self._structure({"output": Field(shape, np.dtype(np.float32))})["output"]
        wide = query.astype(np.float64)
        expected = spec.model.attend(wide, keys, values, options)
        bound = spec.attention.tolerance(
            wide[None], keys[None], values[None], spec.attention.reach(key_parts)[None],
            spec.attention.reach(value_parts)[None], **options,
        ).output[0]  # fmt: skip
        self.verdict.stages.append("output")
        wrong = ~(np.abs(got - expected) <= bound)
        if wrong.any():
            far = np.where(np.isnan(got), np.inf, np.abs(got - expected) / bound)
            index = tuple(int(i) for i in np.unravel_index(np.argmax(far * wrong), far.shape))
            self._wrong(
                "output", "outputs are farther from float64 than the tolerance of A3",
                index=index, got=text_of(got[index]), expected=repr(float(expected[index])),
                shown=(("tolerance", f"{bound[index]:.3g}"), ("times it", f"{far[index]:.3g}")),
                wrong=int(wrong.sum()), of=wrong.size,
            )  # fmt: skip


def _quantized(parts: dict[str, Any], shape: tuple[int, ...], scheme: Scheme) -> Quantized:
    dtype = parts["sinks"].dtype if "sinks" in parts else np.dtype(np.float32)
    return Quantized(scheme, shape, dtype, **parts)
