"""Attention, judged against float64 over the decoded arrays, within the tolerance of rule A3."""

from __future__ import annotations

import numpy as np

from nsq_ref.codec import Quantized
from nsq_ref.conformance.judge.arrays import text_of
from nsq_ref.conformance.judge.stages import Judging
from nsq_ref.conformance.operations import attention_options, stored_side
from nsq_ref.scheme import Field


class JudgingAttend(Judging):
    """The outputs of attention."""

    def stages(self) -> None:
        """Judge structure and outputs."""
        inputs, spec = self.case.inputs, self.reference
        query = inputs["query"]
        sides = []
        for side in ("keys", "values"):
            parts, shape, scheme = stored_side(self.case, side)
            decoded = spec.model.decode(parts, scheme, shape)
            kind = parts["sinks"].dtype if "sinks" in parts else np.dtype(np.float32)
            sides.append((decoded, Quantized(scheme, shape, kind, **parts)))
        options = attention_options(inputs)
        (keys, key_parts), (values, value_parts) = sides
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
