"""Decoded arrays, judged value by value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from nsq_ref.conformance.judge.arrays import ordered, place_of, text_of
from nsq_ref.conformance.judge.stages import Judging
from nsq_ref.dtypes import Array
from nsq_ref.scheme import Field


class JudgingDecode(Judging):
    """``x_hat`` of stored parts."""

    def stages(self) -> None:
        """Judge structure and values."""
        inputs, scheme = self.case.inputs, self.scheme
        shape = tuple(inputs["shape"].tolist())
        parts = {name: part for name, part in inputs.items() if name != "shape"}
        layout = {"x_hat": Field(shape, np.dtype(np.float32))}
        got = self._structure(layout)["x_hat"]
        expected = self.reference.model.decode(parts, scheme, shape)
        allowed = self._flushed(got, expected)
        steps = max(self.latitudes.gain_folding, self.latitudes.supposed.decoded)
        if steps and np.isfinite(got).all():
            far = np.abs(ordered(got) - ordered(expected))
            allowed["gain-folding"] = far <= steps
        self._compare("x_hat", got, expected, allowed, lambda at: self._decode_story(parts, at))
        for finding in self.verdict.findings:
            if finding.index and finding.index[-2] < scheme.sink_tokens:
                self.verdict.findings = [replace(finding, rule="K1")]

    def _decode_story(
        self, parts: Mapping[str, Array], at: tuple[int, ...]
    ) -> Iterator[tuple[str, str]]:
        scheme, spec = self.scheme, self.reference.spec
        shape = self.case.inputs["shape"]
        lead, t, j = at[:-2], at[-2] - min(scheme.sink_tokens, int(shape[-2])), at[-1]
        if t < 0:
            yield "sink", text_of(parts["sinks"][at])
            return
        block = self.reference.model.block_of(parts, scheme, int(shape[-1]))
        rows = spec.block_slices(block.codes.shape[-2], scheme)
        scale, zero = (self._each_token(part, rows) for part in (block.scale, block.zero))
        token, element = (*lead, t), (*lead, t, j)
        yield "code", str(block.codes[element])
        yield "scale", text_of(scale[place_of(scale, element)])
        if not scheme.symmetric:
            yield "zero", text_of(zero[place_of(zero, element)])
        if not scheme.separate_norm:
            return
        if scheme.magnitude == "norm":
            block_at = (*lead, next(b for b, one in enumerate(rows) if one.start <= t < one.stop))
            y = spec.dequantized_direction(
                *(part[token][None] for part in (block.codes, scale, zero)),
                block.outlier_index[block_at][None], block.outliers[token][None],
            )  # fmt: skip
            yield "y", text_of(y[0, j])
            yield "||y||", text_of(self.reference.rounding.norm(y)[0])
        yield ("norm" if scheme.magnitude == "norm" else "gain"), text_of(block.norm[token])
