"""What a cache stores after appends and crops, judged part by part."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from nsq_ref.conformance.judge.stages import Judging
from nsq_ref.conformance.model import APPEND, Parts
from nsq_ref.scheme import Field


class JudgingStream(Judging):
    """Sealed blocks, sinks and tail of one row."""

    def stages(self) -> None:
        """Judge structure and parts, all against what the reference stores."""
        expected = self._expected()
        layout = {name: Field(part.shape, part.dtype) for name, part in expected.items()}
        parts = self._structure(layout)
        factor = "norm" if self.scheme.magnitude == "norm" else "gain"
        for name, stage in (
            ("sinks", "sinks"), ("outlier_index", "outlier_index"), ("norm", factor),
            ("outliers", "outliers"), ("zero", "zero"), ("scale", "scale"), ("packed", "packed"),
            ("tail", "tail"),
        ):  # fmt: skip
            if name in parts:
                before = len(self.verdict.findings)
                self._compare(
                    stage, parts[name], expected[name], shown=lambda _: iter(self._history())
                )
                for i in range(before, len(self.verdict.findings)):
                    rule = self._flag_rule(("B1", "B2", "C1", "K1", "F1"))
                    self.verdict.findings[i] = replace(self.verdict.findings[i], rule=rule)

    def _expected(self) -> Parts:
        """Return what the reference stores, with feedback where the case has some (F1)."""
        inputs, model = self.case.inputs, self.reference.model
        given = inputs["x"], self.scheme, inputs["steps"], int(inputs["row"].item())
        stored: Parts = (
            model.stream_with_feedback(*given, inputs["order"], inputs["factor"])
            if "order" in inputs
            else model.stream(*given)
        )
        return stored

    def _part_rule(self, name: str, layout: Mapping[str, Field]) -> str:
        got = self.answer.arrays.get(name)
        if got is not None and name in layout and got.shape != layout[name].shape:
            return self._flag_rule(("B1", "C1", "K1", "B2", "F1"))
        return super()._part_rule(name, layout)

    def _history(self) -> tuple[tuple[str, str], ...]:
        inputs = self.case.inputs
        steps = inputs["steps"][:, [0, 1 + int(inputs["row"].item())]].tolist()
        words = []
        for (kind, count), same in itertools.groupby(map(tuple, steps)):
            times = len(list(same))
            step = f"append {count}" if kind == APPEND else f"crop to {count}"
            words.append(step if times == 1 else f"{times} times {step}")
        return (("steps", ", ".join(words)),)
