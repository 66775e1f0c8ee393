"""What an answer may be where earlier values are a few float32 steps off, as `Steps` supposes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from nsq_ref.conformance.judge.arrays import bits_of, moved
from nsq_ref.conformance.judge.latitudes import Steps
from nsq_ref.conformance.mistakes.reference import Reference
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.scheme import Scheme

SUPPOSED = "supposed"  # in the place of a latitude's name


class Around:
    """The values around the right ones of one array of tokens."""

    def __init__(
        self, reference: Reference, scheme: Scheme, steps: Steps, x: Array, norm: Array, size: Array
    ) -> None:
        self._reference, self._scheme, self._steps = reference, scheme, steps
        self._x, self._norm, self._size = x, norm, size
        self.directions: list[Array] = []
        if steps.norm or steps.direction:  # the ends are enough: what follows is monotone
            for end in dict.fromkeys((-steps.norm, steps.norm)):
                divided = reference.spec.direction_of(x, moved(norm, end))
                for further in dict.fromkeys((-steps.direction, steps.direction)):
                    self.directions.append(moved(divided, further))

    def scales(self, spans: Sequence[Array]) -> list[Array]:
        """Return scales of all these spans, and of quotients that are off themselves."""
        steps, reference, scheme = self._steps.scale, self._reference, self._scheme
        if not steps and len(spans) == 1:
            return []
        scales = [reference.spec.scale_of(span, scheme) for span in spans]
        if not steps:
            return scales
        levels, dtype = np.float32(scheme.code_range[1]), FLOAT_DTYPES[scheme.scale_dtype]
        for span, end in itertools.product(spans, (-steps, steps)):
            scales.append(reference.rounding.narrow(moved(span / levels, end), dtype))
        return scales

    def codes(
        self, got: Array, expected: Array, free: Array, scale: Array, zero: Array
    ) -> dict[str, Array]:
        """Return where codes are right for a token of another norm, direction or quotient.

        Those that are not `free`, of zero tokens and outlier channels, are what they are.
        """
        steps, spec = self._steps, self._reference.spec
        if not (steps.norm or steps.direction or steps.quotient):
            return {}
        scale, zero = scale.astype(np.float32), zero.astype(np.float32)
        one, none = np.ones_like(scale), np.full_like(zero, -0.0)
        near = np.zeros(got.shape, bool)
        for norm in _moves(steps.norm):
            direction = spec.direction_of(self._x, moved(self._norm, norm))
            right = ~free & (got == expected)
            for further in _moves(steps.direction):
                quotient = (moved(direction, further) - zero) / spec.where_zero(scale, np.inf)
                for last in _moves(steps.quotient):
                    right |= got == spec.code(moved(quotient, last), one, none, self._scheme)
            near |= right.all(axis=-1, keepdims=True) if steps.norm else right
        return {SUPPOSED: near}

    def gains(self, got: Array, y: Array) -> dict[str, Array]:
        """Return where gains are right for a token of another norm."""
        steps, spec, scheme = self._steps, self._reference.spec, self._scheme
        if not steps.norm or scheme.magnitude != "gain":
            return {}
        moves = _moves(2 * steps.norm + 1)  # ||y|| is off like the norm, and the quotient rounds
        narrow, dtype = self._reference.rounding.narrow, FLOAT_DTYPES[scheme.norm_dtype]
        factor = spec.factor(self._x, y, self._norm, scheme, None, self._size)
        return among(got, [narrow(moved(factor, step), dtype) for step in moves])


def _moves(steps: int) -> Iterator[int]:
    """All numbers of steps, none first."""
    return iter(sorted(range(-steps, steps + 1), key=abs))


def among(got: Array, near: Sequence[Array]) -> dict[str, Array]:
    """Return where an array has the bits of one of others."""
    if not near:
        return {}
    return {SUPPOSED: np.any([bits_of(got) == bits_of(one) for one in near], axis=0)}


def between(got: Array, ends: Sequence[Array]) -> dict[str, Array]:
    """Return where an array lies between the least and the greatest of others."""
    if not ends:
        return {}
    stacked = np.stack([end.astype(np.float32) for end in ends])
    wide = got.astype(np.float32)
    return {SUPPOSED: (wide >= stacked.min(axis=0)) & (wide <= stacked.max(axis=0))}
