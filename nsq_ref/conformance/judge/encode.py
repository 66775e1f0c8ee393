"""Encoded arrays, judged stage by stage, each on what the port itself stored before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

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

    coded_late = False  # whether outliers are known with the codes only (F1)

    x: Array  # what is coded, behind the sinks
    rows: list[slice]  # the tokens of each block
    own: spec.Block  # the port's
    norm: Array
    size: Array  # of the channel of each element (N3)
    direction: Array
    w: Array  # what is coded: the directions, or what feedback makes of them (F1)
    length: Array | None = None  # of directions, by that of what is coded, under feedback (M2)
    coded: Array  # what is no outlier channel
    around: Around

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
        reference, scheme = self.reference, self.scheme
        self.x = x
        self.rows = reference.spec.block_slices(x.shape[-2], scheme)
        self.own = own = reference.model.block_of(parts, scheme, x.shape[-1])
        self.norm, self.size = reference.model.norms_and_sizes(x, scheme)
        used = self.norm
        if scheme.separate_norm and scheme.magnitude == "norm":
            if self._is_asked("norm"):
                self._judge_norm()
            if scheme.norm_dtype == "float32" and np.isfinite(own.norm).all():
                used = own.norm
        norms = [used[..., one] for one in self.rows]
        self.direction = _each(reference.spec.direction_of, self._of_tokens(x), norms)
        self.around = Around(reference, scheme, self.latitudes.supposed, x, used, self.size)
        self.coded = np.ones((*x.shape[:-2], len(self.rows), x.shape[-1]), bool)
        if scheme.outlier_channels:
            self._judge_outliers()
        self._move()
        if self._is_asked("zero", "scale"):
            self._judge_ranges()
        if not (np.isfinite(own.scale).all() and np.isfinite(own.zero).all()):
            raise MeaninglessError
        if self._is_asked("codes", *(["outliers"] if self.coded_late else [])):
            self._judge_codes()
        lowest, highest = scheme.code_range
        if (own.codes < lowest).any() or (own.codes > highest).any():
            raise MeaninglessError
        if self._is_asked("packed"):
            self._compare("packed", parts["packed"], reference.packing.pack(own.codes, scheme),
                          what="padding bits behind the last channel differ")  # fmt: skip
        if scheme.separate_norm and scheme.magnitude != "norm":
            self._judge_gains()

    def _judge_norm(self) -> None:
        """Stored norms."""
        x, norm, got = self.x, self.norm, self.own.norm
        expected = self.reference.spec.stored_factor(x, x, norm, self.scheme)
        self._compare(
            "norm", got, expected,
            {**self._near_norm(got, norm, self.latitudes.supposed.norm),
             **self._flushed(got, expected)},
            lambda index: self._norm_story(x, norm, index),
        )  # fmt: skip

    def _judge_outliers(self) -> None:
        """Outlier channels, and what is stored of them if that does not wait for the scales."""
        spec, scheme = self.reference.spec, self.scheme
        index, head_dim = self.own.outlier_index, self.x.shape[-1]
        directions = self._of_tokens(self.direction)
        if self._is_asked("outlier_index"):
            expected = _each(lambda d: spec.outlier_channels(d, scheme), directions)
            self._compare("outlier_index", index, expected)
        if ((index < 0) | (index >= head_dim)).any() or (np.diff(index, axis=-1) < 1).any():
            raise MeaninglessError
        self.coded = ~spec.mark(index, head_dim)
        if self._is_asked("outliers") and not self.coded_late:
            got, expected = self.own.outliers, self._kept_outliers(self.direction)
            near = [self._kept_outliers(d) for d in self.around.directions]
            self._compare("outliers", got, expected, among(got, near))

    def _judge_ranges(self) -> None:
        """Zeros and scales."""
        spec, scheme, own, around = self.reference.spec, self.scheme, self.own, self.around
        low, high = self._measured_extents()
        if scheme.scale_rule == "search":  # the encoder's choice (S4), but not just anything
            if not scheme.symmetric:
                self._storable("zero", own.zero)
            self._storable("scale", own.scale)
            return
        near_extents = [self._extents(d) for d in around.directions]

        def range_story(at: tuple[int, ...]) -> Iterator[tuple[str, str]]:
            yield "minimum", text_of(low[at])
            yield "maximum", text_of(high[at])
            if not scheme.symmetric:
                yield "zero", text_of(own.zero[at])
            span = spec.range_span(low, high, own.zero, scheme)[at]
            yield "over", str(scheme.code_range[1])
            yield "quotient", text_of(np.float32(span) / np.float32(scheme.code_range[1]))

        if not scheme.symmetric:
            expected = spec.range_zero(low, scheme)
            self._compare(
                "zero", own.zero, expected,
                {**self._near_scale(own.zero, low, spec.range_zero),
                 **between(own.zero, [spec.range_zero(end, scheme) for end, _ in near_extents]),
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

    def _judge_codes(self) -> None:
        """Codes and, where they are coded with them, outliers."""
        spec, scheme, own, norm = self.reference.spec, self.scheme, self.own, self.norm
        direction = self.w
        directions, coded = self._of_tokens(direction), self._of_blocks(self.coded)

        def code(d: Array, s: Array, z: Array, c: Array, n: Array) -> Array:
            return np.asarray(spec.without_codes(spec.code(d, s, z, scheme), c, n))

        norms = [norm[..., one] for one in self.rows]
        codes = _each(code, directions, *self._of_scales(), coded, norms)
        counts = [one.stop - one.start for one in self.rows]
        free = np.repeat(self.coded, counts, axis=-2) & (norm != 0)[..., None]
        scale, zero = (self._each_token(part, self.rows) for part in (own.scale, own.zero))
        near_tie = {}
        if self.latitudes.tie_ulp:
            near_tie = self._near_tie(own.codes, codes, direction, scale, zero)
        if self.coded_late and scheme.outlier_channels:
            self._compare("outliers", own.outliers, self._kept_outliers(direction))
        self._compare(
            "codes", own.codes, codes,
            {**near_tie, **self.around.codes(own.codes, codes, free, scale, zero)},
            lambda at: self._code_story(self.x, norm, direction, scale, zero, at),
            what=self._code_words(own.codes, codes, direction, scale, zero),
        )  # fmt: skip
        last = self.verdict.findings[-1] if self.verdict.findings else None
        if last is not None and last.stage == "codes" and _renamed(own.codes, codes):
            self.verdict.findings[-1] = replace(last, rule="P1")

    def _judge_gains(self) -> None:
        """Stored gains, those of least squares too."""
        spec, scheme, x, norm, own = self.reference.spec, self.scheme, self.x, self.norm, self.own
        y = _each(
            spec.dequantized_direction, self._of_tokens(own.codes), *self._of_scales(),
            self._of_blocks(own.outlier_index), self._of_tokens(own.outliers),
        )  # fmt: skip
        gain = spec.factor(x, y, norm, scheme, self.length, self.size)
        expected = spec.stored_factor(x, y, norm, scheme, self.length, self.size)
        self._compare(
            "gain", own.norm, expected,
            {**self._near_norm(own.norm, gain, self.latitudes.supposed.gain),
             **self.around.gains(own.norm, y), **self._flushed(own.norm, expected)},
            lambda at: self._gain_story(norm, y, gain, at),
        )  # fmt: skip

    def _gain_story(
        self, norm: Array, y: Array, gain: Array, at: tuple[int, ...]
    ) -> Iterator[tuple[str, str]]:
        yield "norm", text_of(norm[at])
        if self.length is None or self.scheme.magnitude != "gain":
            sized = self.scheme.norm_rule == "balanced" and self.scheme.magnitude == "gain"
            length = self.reference.spec.length_if_finite(y / self.size if sized else y)
            yield "||y / size||" if sized else "||y||", text_of(length[at])
        else:
            yield "a / b", text_of(np.float32(self.length[at].real))
        yield "gain", text_of(np.float32(gain[at]))

    # --- block by block -------------------------------------------------------------------------

    def _of_tokens(self, array: Array) -> list[Array]:
        """Cut by the tokens of each block."""
        return [array[..., one, :] for one in self.rows]

    def _of_blocks(self, array: Array) -> list[Array]:
        """Cut where there is one entry a block."""
        return [array[..., b : b + 1, :] for b in range(len(self.rows))]

    def _of_scales(self) -> tuple[list[Array], list[Array]]:
        """The port's scales and zeros of each block."""
        cut = self._of_blocks if self.scheme.axis == "channel" else self._of_tokens
        return cut(self.own.scale), cut(self.own.zero)

    def _extents(self, direction: Array) -> list[Array]:
        """Minima and maxima of each block."""
        both = [
            self.reference.spec.extent(*cut, self.scheme)
            for cut in zip(self._of_tokens(direction), self._of_blocks(self.coded), strict=True)
        ]
        return [np.concatenate(side, axis=-2) for side in zip(*both, strict=True)]

    def _kept_outliers(self, direction: Array) -> Array:
        cut = self._of_tokens(direction), self._of_blocks(self.own.outlier_index)
        return _each(self.reference.spec.kept_outliers, *cut)

    def _move(self) -> None:
        """Set what is coded; without feedback these are the directions."""
        self.w = self.direction

    def _measured_extents(self) -> list[Array]:
        """Minima and maxima of what the scales of each block are made of."""
        return self._extents(self.direction)

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
        exact = math.fsum(np.square(x[at], dtype=np.float64))  # of squares that are exact
        yield "sum of squares", f"{exact!r}"
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


def _each(function: Callable[..., Array], *cut: list[Array]) -> Array:
    """Apply to each block what was cut for it."""
    return np.concatenate(list(map(function, *cut)), axis=-2)


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
