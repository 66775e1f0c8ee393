"""Encoded arrays, judged stage by stage, each on what the port itself stored before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np

from nsq_ref import spec
from nsq_ref.conformance.judge.around import Around, among, between
from nsq_ref.conformance.judge.arrays import (
    bits_of,
    element_of,
    moved,
    ordered,
    place_of,
    text_of,
)
from nsq_ref.conformance.judge.stages import ON_TIES, Judging, MeaninglessError
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.scheme import Field


class JudgingEncode(Judging):
    """The parts of an encoded array."""

    # What is coded in place of the directions is known when the scales are (F1); else before.
    coded_late = False

    def stages(self) -> None:
        """Judge structure and sinks, then what blocks store."""
        x = self.case.inputs["x"]
        lead, layout = x.shape[:-2], self.scheme.layout(x.shape[-2], x.shape[-1], x.dtype)
        parts = self._structure({n: Field((*lead, *f.shape), f.dtype) for n, f in layout.items()})
        sinks, coded = self.reference.model.split_sinks(x, self.scheme)
        if "sinks" in parts:
            self._compare("sinks", parts["sinks"], sinks)
        if coded.shape[-2]:
            self._judge_blocks(coded, parts)

    def _judge_blocks(self, x: Array, parts: Mapping[str, Array]) -> None:
        """The stages of `spec.encode`, in its order, each from the port's own stage before."""
        reference, scheme, latitudes = self.reference, self.scheme, self.latitudes
        supposed = latitudes.supposed
        spec, head_dim = reference.spec, x.shape[-1]
        rows = spec.block_slices(x.shape[-2], scheme)
        own = reference.model.block_of(parts, scheme, head_dim)

        def of_tokens(array: Array, axis: int = -2) -> list[Array]:
            """Cut by the tokens of each block."""
            return [np.moveaxis(np.moveaxis(array, axis, 0)[one], 0, axis) for one in rows]

        def of_blocks(array: Array) -> list[Array]:
            """Cut where there is one entry a block."""
            return [array[..., b : b + 1, :] for b in range(len(rows))]

        def each(function: Callable[..., Array], *cut: list[Array]) -> Array:
            """Apply to each block what was cut for it."""
            return np.concatenate(list(map(function, *cut)), axis=-2)

        of_scales = of_blocks if scheme.axis == "channel" else of_tokens
        own_scale, own_zero = of_scales(own.scale), of_scales(own.zero)
        norm = reference.rounding.norm(x) if scheme.separate_norm else np.ones(x.shape[:-1], "f4")
        used = norm
        if scheme.separate_norm and scheme.magnitude == "norm":
            expected = spec.stored_factor(x, x, norm, scheme)
            self._compare(
                "norm", own.norm, expected,
                {**self._near_norm(own.norm, norm, supposed.norm),
                 **self._flushed(own.norm, expected)},
                lambda index: self._norm_story(x, norm, index),
            )  # fmt: skip
            if scheme.norm_dtype == "float32" and np.isfinite(own.norm).all():
                used = own.norm
        direction = spec.direction_of(x, used)
        around = Around(reference, scheme, supposed, x, used)
        directions, index = of_tokens(direction), own.outlier_index

        coded = np.ones((*x.shape[:-2], len(rows), head_dim), bool)
        if scheme.outlier_channels:
            expected = each(lambda d: spec.outlier_channels(d, scheme), directions)
            self._compare("outlier_index", index, expected)
            if ((index < 0) | (index >= head_dim)).any() or (np.diff(index, axis=-1) < 1).any():
                raise MeaninglessError
            coded = ~spec.mark(index, head_dim)
            near = [
                each(spec.kept_outliers, of_tokens(d), of_blocks(index)) for d in around.directions
            ]
            if not self.coded_late:
                expected = each(spec.kept_outliers, directions, of_blocks(index))
                self._compare("outliers", own.outliers, expected, among(own.outliers, near))

        def extents(direction: Array) -> list[Array]:
            return [
                each(lambda d, c, side=side: spec.extent(d, c, scheme)[side],
                     of_tokens(direction), of_blocks(coded))
                for side in (0, 1)
            ]  # fmt: skip

        def under_feedback(function: Callable[..., Array]) -> Array:
            """Apply a function of F1 to each block."""
            return each(
                lambda *cut: self._under_feedback(function, *cut), directions, own_scale, own_zero,
                of_blocks(coded), of_tokens(norm[..., None]),
            )  # fmt: skip

        low, high = extents(under_feedback(reference.model.measured))
        near_extents = [extents(d) for d in around.directions]

        def range_story(at: tuple[int, ...]) -> Iterator[tuple[str, str]]:
            yield "minimum", text_of(low[at])
            yield "maximum", text_of(high[at])
            if not scheme.symmetric:
                yield "zero", text_of(own.zero[at])
            span = spec.range_span(low, high, own.zero, scheme)[at]
            yield "over", str(scheme.code_range[1])
            yield "quotient", text_of(np.float32(span) / np.float32(scheme.code_range[1]))

        if scheme.scale_rule == "range":
            if not scheme.symmetric:
                expected = spec.range_zero(low, scheme)
                self._compare(
                    "zero", own.zero, expected,
                    {**self._near_scale(own.zero, low, spec.range_zero),
                     **between(own.zero, [spec.range_zero(end, scheme)
                                           for end, _ in near_extents]),
                     **self._flushed(own.zero, expected)}, range_story,
                )  # fmt: skip
            span = spec.range_span(low, high, own.zero, scheme)
            expected = spec.scale_of(span, scheme)
            self._compare(
                "scale", own.scale, expected,
                {**self._near_scale(own.scale, span, spec.scale_of),
                 **between(own.scale, around.scales(
                     [span, *(spec.range_span(*ends, own.zero, scheme) for ends in near_extents)])),
                 **self._flushed(own.scale, expected)}, range_story,
            )  # fmt: skip
        else:  # the encoder's choice (S4), but not just anything
            if not scheme.symmetric:
                self._storable("zero", own.zero)
            self._storable("scale", own.scale)
        if not (np.isfinite(own.scale).all() and np.isfinite(own.zero).all()):
            raise MeaninglessError

        direction = under_feedback(spec.fed_back)
        directions = of_tokens(direction)

        def code(d: Array, s: Array, z: Array, c: Array, n: Array) -> Array:
            return np.asarray(spec.without_codes(spec.code(d, s, z, scheme), c, n))

        codes = each(
            code, directions, own_scale, own_zero, of_blocks(coded), of_tokens(norm, axis=-1)
        )
        scale, zero = (self._each_token(part, rows) for part in (own.scale, own.zero))
        free = (
            np.concatenate(
                [
                    np.broadcast_to(c, d.shape)
                    for c, d in zip(of_blocks(coded), directions, strict=True)
                ],
                axis=-2,
            )
            & (norm != 0)[..., None]
        )
        near_tie = (
            self._near_tie(own.codes, codes, direction, scale, zero) if latitudes.tie_ulp else {}
        )
        own_codes = own.codes
        if self.coded_late:
            expected = each(spec.kept_outliers, directions, of_blocks(index))
            indices = np.repeat(index, [one.stop - one.start for one in rows], axis=-2)
            own_codes, outliers = self._first_wrong(codes, expected, own, indices)
            if scheme.outlier_channels:
                self._compare("outliers", outliers, expected)
        self._compare(
            "codes", own_codes, codes,
            {**near_tie, **around.codes(own.codes, codes, free, scale, zero)},
            lambda at: self._code_story(x, norm, direction, scale, zero, at),
            what=self._code_words(own.codes, codes, direction, scale, zero),
        )  # fmt: skip
        last = self.verdict.findings[-1] if self.verdict.findings else None
        if last is not None and last.stage == "codes" and _renamed(own.codes, codes):
            self.verdict.findings[-1] = replace(last, rule="P1")
        lowest, highest = scheme.code_range
        if (own.codes < lowest).any() or (own.codes > highest).any():
            raise MeaninglessError
        self._compare("packed", parts["packed"], reference.packing.pack(own.codes, scheme),
                      what="padding bits behind the last channel differ")  # fmt: skip
        if scheme.separate_norm and scheme.magnitude != "norm":
            y = each(
                spec.dequantized_direction, of_tokens(own.codes), own_scale, own_zero,
                of_blocks(index), of_tokens(own.outliers),
            )  # fmt: skip
            gain = spec.factor(x, y, norm, scheme)
            expected = spec.stored_factor(x, y, norm, scheme)
            self._compare(
                "gain", own.norm, expected,
                {**self._near_norm(own.norm, gain, supposed.gain),
                 **around.gains(own.norm, y), **self._flushed(own.norm, expected)},
                lambda at: iter([
                    ("norm", text_of(norm[at])),
                    ("||y||", text_of(reference.rounding.norm(y)[at])),
                    ("gain", text_of(np.float32(gain[at]))),
                ]),
            )  # fmt: skip

    def _under_feedback(
        self, function: Callable[..., Array], direction: Array, *known: Array
    ) -> Array:
        """Apply a function of F1 to a block; without feedback the directions stay."""
        return direction

    def _first_wrong(
        self, codes: Array, outliers: Array, own: spec.Block, index: Array
    ) -> tuple[Array, Array]:
        """Return the port's codes and outliers, those made right that others may have made wrong.

        ``index`` has the channels of each token's outliers.
        """
        return own.codes, own.outliers

    def _near_norm(self, got: Array, exact: Array, supposed: int) -> dict[str, Array]:
        steps = max(self.latitudes.norm_ulp, supposed)
        if not steps:
            return {}
        dtype = FLOAT_DTYPES[self.scheme.norm_dtype]
        near = np.zeros(got.shape, bool)
        for step in range(-steps, steps + 1):
            near |= bits_of(got) == bits_of(
                self.reference.rounding.narrow(moved(exact, step), dtype)
            )
        return {"norm-ulp": near}

    def _near_scale(self, got: Array, wide: Array, rule: Callable[..., Array]) -> dict[str, Array]:
        """Scales of directions that err because their norms do."""
        steps = self.latitudes.norm_ulp
        if not steps or not self.scheme.separate_norm:
            return {}
        ends = np.stack([rule(moved(wide, s), self.scheme) for s in (-2 * steps, 2 * steps)])
        return {"norm-ulp": (got >= ends.min(axis=0)) & (got <= ends.max(axis=0))}

    def _near_tie(
        self, got: Array, expected: Array, direction: Array, scale: Array, zero: Array
    ) -> dict[str, Array]:
        by_one = np.abs(got.astype(int) - expected) == 1
        scale, zero = scale.astype(np.float32), zero.astype(np.float32)
        tie = np.float32(0.5) * (got.astype(np.float32) + expected.astype(np.float32))
        quotient = (direction - zero) / self.reference.spec.where_zero(scale, np.inf)
        steps = np.abs(ordered(quotient) - ordered(tie))
        near = by_one & (scale != 0) & (steps <= self.latitudes.tie_ulp)
        # Both sides of (d - z) / s = tie are exact: a product of 24 and 10 bits, and a difference
        # with what its rounding leaves.
        d, z = direction.astype(np.float64), zero.astype(np.float64)
        difference = d - z
        back = difference - d
        lost = (d - (difference - back)) - (z + back)
        near &= (difference != tie.astype(np.float64) * scale) | (lost != 0)
        return {"tie-ulp": near}

    def _code_words(
        self, got: Array, expected: Array, direction: Array, scale: Array, zero: Array
    ) -> str:
        off = np.abs(got.astype(int) - expected)
        if not off.any():
            return ""
        scale, zero = scale.astype(np.float32), zero.astype(np.float32)
        doubled = 2 * (direction - zero) / self.reference.spec.where_zero(scale, np.inf)
        on_ties = np.abs(np.fmod(doubled, 2)) == 1
        most = int(off.max())
        if on_ties[off > 0].all() and most == 1:
            return f"codes differ, {ON_TIES}"
        return "codes differ, by one at most" if most == 1 else f"codes differ, by up to {most}"

    def _norm_story(self, x: Array, norm: Array, at: tuple[int, ...]) -> Iterator[tuple[str, str]]:
        exact = sum((Fraction(float(v)) ** 2 for v in x[at]), Fraction())
        yield "sum of squares", f"{float(exact)!r}"
        yield "norm in float32", text_of(norm[at])

    def _code_story(
        self, x: Array, norm: Array, direction: Array, scale: Array, zero: Array,
        at: tuple[int, ...],
    ) -> Iterator[tuple[str, str]]:  # fmt: skip
        d, s, z = element_of(direction, scale, zero, at)
        yield "x", text_of(x[at])
        if self.scheme.separate_norm:
            yield "norm", text_of(norm[at[:-1]])
        if self.coded_late:
            yield "w", text_of(d)
        elif self.scheme.separate_norm:
            yield "direction", text_of(d)
        yield "scale", text_of(scale[place_of(scale, at)])
        if not self.scheme.symmetric:
            yield "zero", text_of(zero[place_of(zero, at)])
        if s == 0:
            yield "quotient", "none: the scale is 0"
            return
        quotient = np.float32(d - z) / s
        words = text_of(quotient)
        if np.isfinite(quotient):
            doubled = 2 * float(quotient)
            if doubled == int(doubled) and int(doubled) % 2:
                words += "  (a tie)"
        yield "quotient", words

    def _collapses(self) -> bool:
        _, coded = self.reference.model.split_sinks(self.case.inputs["x"], self.scheme)
        if not coded.size:
            return False
        return bool(self._encoded(coded).collapsed.any())

    def _encoded(self, coded: Array) -> spec.Block:
        """Return what the right blocks are."""
        block: spec.Block = self.reference.spec.encode_blocks(coded, self.scheme)
        return block


def _renamed(got: Array, expected: Array) -> bool:
    """Whether every code is stored, most of them wrongly, as one other code."""
    least = min(int(got.min()), int(expected.min()))
    span = max(int(got.max()), int(expected.max())) - least + 1
    pairs = (expected.astype(np.int64) - least) * span + (got.astype(np.int64) - least)
    counts = np.bincount(pairs.ravel(), minlength=span * span).reshape(span, span) > 0
    kinds = int(counts.sum())
    different = kinds - int(np.diagonal(counts).sum())
    return bool(
        int(counts.any(axis=0).sum()) == int(counts.any(axis=1).sum()) == kinds >= 4
        and 2 * different > kinds
    )
