"""Judge one answer: stage by stage, each on what the port itself stored at the stage before.

So one wrong norm does not make every code wrong. All stages come from the functions of a
`Reference`, which may have a mistake in it: that is how `diagnose` finds out what a port does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref.codec import Quantized
from nsq_ref.conformance.findings import Explained, Finding
from nsq_ref.conformance.flags import FLAGS
from nsq_ref.conformance.frames import scheme_of
from nsq_ref.conformance.model import APPEND
from nsq_ref.conformance.operations import REFUSED, Answer, Case, attention_options
from nsq_ref.conformance.reference import Reference
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import FLOAT_DTYPES, Field, Scheme

__all__ = ["LATITUDES", "STAGES", "Latitudes", "Verdict", "default_rule", "judge"]

Array = npt.NDArray[Any]

# What each stage compares, in the order in which an implementer writes and mends them.
STAGES = {
    "again": "answers",
    "refusal": "refusals",
    "structure": "arrays",
    "sinks": "sinks",
    "norm": "norms",
    "outlier_index": "outlier channels",
    "outliers": "outliers",
    "zero": "zeros",
    "scale": "scales",
    "codes": "codes",
    "packed": "bytes",
    "gain": "gains",
    "tail": "elements of the tail",
    "x_hat": "decoded values",
    "output": "outputs",
}

# The rules that a stage can break: the one that is named where nothing tells more, then others
# that a case's chief flag may point to.
_RULES: dict[str, tuple[str, ...]] = {
    "sinks": ("K1", "I1"),
    "outlier_index": ("O1", "N1", "N2", "I1"),
    "norm": ("N1", "M1", "M4", "Z1", "I1"),
    "outliers": ("O1", "N2", "Z1", "I1"),
    "zero": ("S2", "S3", "Z1", "N1", "N2", "B1", "B2", "K1", "O1", "I1"),
    "scale": ("S1", "S2", "S3", "S5", "Z1", "N1", "N2", "B1", "B2", "K1", "O1", "I1"),
    "codes": ("Q1", "Q2", "N1", "N2", "S3", "O1", "B1", "B2", "K1", "I1"),
    "packed": ("P1",),
    "gain": ("M2", "M3", "M4", "Z1", "N1", "I1"),
    "tail": ("B1", "C1", "K1", "B2", "I1"),
    "x_hat": ("D1", "D2", "K1", "O1", "P1", "B1", "N1", "N2"),
    "output": ("A1", "A2"),
}
_PART_RULES = {
    "packed": "P1", "norm": "M1", "scale": "S1", "zero": "S2", "outlier_index": "O1",
    "outliers": "O1", "sinks": "K1", "tail": "B1", "x_hat": "D1", "output": "A1",
}  # fmt: skip

LATITUDES = {
    "norm-ulp": "norms and gains within so many float32 steps of the right one",
    "tie-ulp": "codes one off whose quotient is so many float32 steps from a tie, but not on it",
    "gain-folding": "decoded values within so many float32 steps, as from (norm / ||y||) * y",
    "flush-subnormals": "0 in place of subnormal numbers",
}


@dataclass(frozen=True)
class Latitudes:
    """What may differ from the specification; nothing by default.

    Parameters
    ----------
    norm_ulp, tie_ulp, gain_folding : int
        Steps of float32; see `LATITUDES`.
    flush_subnormals : bool

    Examples
    --------
    >>> Latitudes.parse(["norm-ulp=1", "flush-subnormals"])
    Latitudes(norm_ulp=1, tie_ulp=0, gain_folding=0, flush_subnormals=True)
    """

    norm_ulp: int = 0
    tie_ulp: int = 0
    gain_folding: int = 0
    flush_subnormals: bool = False

    @classmethod
    def parse(cls, names: list[str] | tuple[str, ...]) -> Latitudes:
        """Read names such as ``norm-ulp=1`` and ``gain-folding=2ulp``.

        Raises
        ------
        ValueError
            For a name that is not in `LATITUDES` or comes twice, and for a wrong or missing number.
        """
        values: dict[str, Any] = {}
        for text in names:
            name, equals, number = text.partition("=")
            if name not in LATITUDES:
                raise ValueError(f"latitude {text!r} is unknown; there are {', '.join(LATITUDES)}")
            if name.replace("-", "_") in values:
                raise ValueError(f"latitude {name} is given twice; give it once")
            if name == "flush-subnormals":
                if equals:
                    raise ValueError(f"latitude {text!r} takes no number; write {name}")
                values["flush_subnormals"] = True
                continue
            found = re.fullmatch(r"([1-9][0-9]{0,5})(ulp)?", number)
            if found is None:
                raise ValueError(f"latitude {text!r} needs a number from 1 on, as in {name}=1")
            values[name.replace("-", "_")] = int(found[1])
        return cls(**values)


@dataclass
class Verdict:
    """What the judge makes of one answer.

    Parameters
    ----------
    findings : list of Finding
        The wrong stages, the first one first.
    explained : list of Explained
        Differences that a latitude allows.
    stages : list of str
        The stages that were judged.
    """

    findings: list[Finding] = field(default_factory=list)
    explained: list[Explained] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)


@in_default_environment
def judge(
    case: Case,
    answer: Answer,
    latitudes: Latitudes | None = None,
    reference: Reference | None = None,
) -> Verdict:
    """Judge what a port returned for a case.

    Parameters
    ----------
    case : Case
    answer : Answer
        Done or refused; what a port does not implement is nothing to judge.
    latitudes : Latitudes, optional
        None are allowed by default.
    reference : Reference, optional
        The specification by default.

    Returns
    -------
    Verdict

    Examples
    --------
    >>> from nsq_ref.conformance import model
    >>> from nsq_ref.conformance.cases import cases
    >>> case = cases(Scheme(), ["encode"])[0]
    >>> answer = Answer(0, model.encode(case.inputs["x"], case.scheme))
    >>> judge(case, answer).findings
    []
    """
    judging = _Judging(case, answer, latitudes or Latitudes(), reference or _the_specification())
    with np.errstate(all="ignore"):
        judging.run()
    return judging.verdict


_SPECIFICATION: list[Reference] = []


def _the_specification() -> Reference:
    if not _SPECIFICATION:
        _SPECIFICATION.append(Reference())
    return _SPECIFICATION[0]


def default_rule(stage: str, scheme: Scheme) -> str:
    """Return the rule that a stage breaks where nothing tells more.

    Examples
    --------
    >>> default_rule("scale", Scheme()), default_rule("scale", Scheme(symmetric=False))
    ('S1', 'S2')
    """
    if stage == "scale" and not scheme.symmetric:
        return "S2"
    if stage == "gain":
        return {"gain": "M2", "lsq": "M3"}.get(scheme.magnitude, "M1")
    return _RULES[stage][0]


# --- one answer ---------------------------------------------------------------------------------


class _Wrong(Exception):  # noqa: N818 - it ends the judging, it is not an error
    """What was found makes all later stages meaningless."""


class _Judging:
    """One answer while it is judged; the stages append to the verdict."""

    def __init__(
        self, case: Case, answer: Answer, latitudes: Latitudes, reference: Reference
    ) -> None:
        self.case, self.answer, self.latitudes = case, answer, latitudes
        self.reference, self.scheme = reference, case.scheme
        self.verdict = Verdict()

    def run(self) -> None:
        operation: Callable[[], None] = getattr(self, f"_{self.case.operation}")
        try:
            self._refusal()
            operation()
        except _Wrong:
            pass

    # --- what all operations share

    def _refusal(self) -> None:
        self.verdict.stages.append("refusal")
        refused = self.answer.status == REFUSED
        if refused == (self.case.refused_by is not None):
            if refused:
                raise _Wrong
            return
        if refused:
            said = f": {self.answer.message}" if self.answer.message else ""
            what = f"valid input was refused{said}"
        else:
            what = "input that must be refused was taken"
        rule = self.case.refused_by
        if rule is None and self._collapses():
            rule = "D2"
        rule = rule or self._flag_rule(("I1", "I2", "M4", "S5", "D3", "N1", "O1"))
        self._wrong("refusal", what, rule=rule, got="refused" if refused else "an answer",
                    expected="an answer" if refused else "a refusal")  # fmt: skip
        raise _Wrong

    def _collapses(self) -> bool:
        """Whether a token of the input decodes to zero, which is no reason to refuse it."""
        if self.case.operation != "encode":
            return False
        _, coded = self.reference.model.split_sinks(self.case.inputs["x"], self.scheme)
        if not coded.size:
            return False
        return bool(self.reference.spec.encode_blocks(coded, self.scheme).collapsed.any())

    def _structure(self, layout: Mapping[str, Field]) -> dict[str, Array]:
        """Check names, dtypes and shapes of the answer."""
        self.verdict.stages.append("structure")
        arrays = self.answer.arrays
        problems: list[tuple[str, str, str, str]] = []
        for name, (shape, dtype) in layout.items():
            if name not in arrays:
                if 0 in shape:  # what has no elements need not be there
                    continue
                problems.append((name, f"{name} is missing", "nothing", f"{dtype} {list(shape)}"))
                continue
            got = arrays[name]
            if (got.shape, got.dtype) != (shape, dtype):
                which = "dtype" if got.shape == shape else "shape"
                if got.shape != shape and got.dtype != dtype:
                    which = "dtype and shape"
                problems.append(
                    (
                        name,
                        f"{name} has another {which}",
                        f"{got.dtype} {list(got.shape)}",
                        f"{dtype} {list(shape)}",
                    )
                )
        problems += [
            (name, f"{name} is not stored by this scheme", f"{arrays[name].dtype}", "nothing")
            for name in arrays
            if name not in layout
        ]
        for name, what, got_text, expected in problems:
            rule = self._part_rule(name, layout)
            self._wrong(
                "structure", what, rule=rule, got=got_text, expected=expected, shown=self._history()
            )
        if problems:
            raise _Wrong
        return {
            name: arrays.get(name, np.empty(shape, dtype))
            for name, (shape, dtype) in layout.items()
        }

    def _part_rule(self, name: str, layout: Mapping[str, Field]) -> str:
        """The rule that says which array this is: how many tokens, blocks or bytes there are."""
        got, expected = self.answer.arrays.get(name), layout.get(name)
        if (
            self.case.operation == "stream"
            and got is not None
            and expected is not None
            and got.shape != expected.shape
        ):
            return self._flag_rule(("B1", "C1", "K1", "B2"))
        if name == "norm" and self.scheme.magnitude != "norm":
            return {"gain": "M2", "lsq": "M3"}[self.scheme.magnitude]
        if name == "scale" and not self.scheme.symmetric:
            rule = "S2"
        else:
            rule = _PART_RULES.get(name, "P1")
        if got is None or expected is None or got.ndim != len(expected.shape):
            return rule
        tokens = -1 if name == "norm" else -2
        if got.shape != expected.shape and name != "sinks":
            same = [a == b for a, b in zip(got.shape, expected.shape, strict=True)]
            if not same[tokens] and all(s for i, s in enumerate(same) if i - len(same) != tokens):
                if name in ("scale", "zero", "outlier_index") and self.scheme.axis == "channel":
                    return "B1" if self.scheme.block_size else rule
                return "K1" if self.scheme.sink_tokens else rule
        if got.dtype != expected.dtype and got.shape == expected.shape:
            return {"scale": "S3", "zero": "S3", "norm": "M4"}.get(name, rule)
        return rule

    def _flag_rule(self, candidates: tuple[str, ...]) -> str:
        """The rule of the case's chief flag, if it is one of the candidates, else the first."""
        for flag in self.case.flags:
            if FLAGS[flag].rule in candidates:
                return FLAGS[flag].rule
        return candidates[0]

    def _rule(self, stage: str) -> str:
        chief = FLAGS[self.case.flags[0]].rule
        return chief if chief in _RULES[stage][1:] else default_rule(stage, self.scheme)

    def _wrong(self, stage: str, what: str, *, rule: str | None = None, **details: Any) -> None:
        finding = Finding(self.case, stage, rule or self._rule(stage), what, **details)
        self.verdict.findings.append(finding)

    def _compare(
        self,
        stage: str,
        got: Array,
        expected: Array,
        allowed: Mapping[str, Array] | None = None,
        shown: Callable[[tuple[int, ...]], Iterator[tuple[str, str]]] | None = None,
        what: str = "",
    ) -> None:
        """Compare bits; where a latitude allows a difference, keep a witness."""
        self.verdict.stages.append(stage)
        wrong = _bits(got) != _bits(expected)
        for latitude, where in (allowed or {}).items():
            taken = wrong & where
            if taken.any():
                index = _first(taken)
                self.verdict.explained.append(
                    Explained(
                        self.case,
                        stage,
                        latitude,
                        index,
                        f"{stage}{list(index)} is {_text(got[index])}, exactly "
                        f"{_text(expected[index])}",
                        int(taken.sum()),
                    )
                )
                wrong &= ~where
        if not wrong.any():
            return
        index = _first(wrong)
        only_signs = stage != "x_hat" and bool((got == expected)[wrong].all())
        self._wrong(
            stage, what or f"{STAGES[stage]} differ", rule="Z1" if only_signs else None,
            index=index, got=_text(got[index]),
            expected=_text(expected[index]), shown=tuple(shown(index)) if shown else (),
            wrong=int(wrong.sum()), of=wrong.size,
        )  # fmt: skip

    def _storable(self, stage: str, part: Array) -> None:
        """Find what no encoder may store, whatever it chooses (rules S5, Z1)."""
        self.verdict.stages.append(stage)
        for wrong, rule, expected in (
            (~np.isfinite(part), "S5", "a finite value"),
            ((part == 0) & np.signbit(part), "Z1", "+0"),
        ):
            if wrong.any():
                index = _first(wrong)
                self._wrong(
                    stage, f"{STAGES[stage]} differ", rule=rule, index=index,
                    got=_text(part[index]), expected=expected, wrong=int(wrong.sum()),
                    of=wrong.size,
                )  # fmt: skip

    def _flushed(self, got: Array, expected: Array) -> dict[str, Array]:
        if not self.latitudes.flush_subnormals:
            return {}
        return {"flush-subnormals": (got == 0) & _is_subnormal(expected)}

    # --- encode

    def _encode(self) -> None:
        x = self.case.inputs["x"]
        layout = {
            name: Field((*x.shape[:-2], *part.shape), part.dtype)
            for name, part in self.scheme.layout(x.shape[-2], x.shape[-1], x.dtype).items()
        }
        parts = self._structure(layout)
        sinks, coded = self.reference.model.split_sinks(x, self.scheme)
        if "sinks" in parts:
            self._compare("sinks", parts["sinks"], sinks)
        if coded.shape[-2]:
            self._judge_blocks(coded, parts)

    def _judge_blocks(self, x: Array, parts: Mapping[str, Array]) -> None:
        """The stages of `spec.encode`, in its order, each from the port's own stage before."""
        reference, scheme, latitudes = self.reference, self.scheme, self.latitudes
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
                {**self._near_norm(own.norm, norm), **self._flushed(own.norm, expected)},
                lambda index: self._norm_story(x, norm, index),
            )  # fmt: skip
            if scheme.norm_dtype == "float32" and np.isfinite(own.norm).all():
                used = own.norm
        direction = spec.direction_of(x, used)
        directions, index = of_tokens(direction), own.outlier_index

        coded = np.ones((*x.shape[:-2], len(rows), head_dim), bool)
        if scheme.outlier_channels:
            expected = each(lambda d: spec.outlier_channels(d, scheme), directions)
            self._compare("outlier_index", index, expected)
            if ((index < 0) | (index >= head_dim)).any() or (np.diff(index, axis=-1) < 1).any():
                raise _Wrong
            coded = ~spec.mark(index, head_dim)
            expected = each(spec.kept_outliers, directions, of_blocks(index))
            self._compare("outliers", own.outliers, expected)

        low, high = (
            each(lambda d, c, side=side: spec.extent(d, c, scheme)[side], directions,
                 of_blocks(coded))
            for side in (0, 1)
        )  # fmt: skip

        def range_story(at: tuple[int, ...]) -> Iterator[tuple[str, str]]:
            yield "minimum", _text(low[at])
            yield "maximum", _text(high[at])
            if not scheme.symmetric:
                yield "zero", _text(own.zero[at])
            span = spec.range_span(low, high, own.zero, scheme)[at]
            yield "over", str(scheme.code_range[1])
            yield "quotient", _text(np.float32(span) / np.float32(scheme.code_range[1]))

        if scheme.scale_rule == "range":
            if not scheme.symmetric:
                expected = spec.range_zero(low, scheme)
                self._compare(
                    "zero", own.zero, expected,
                    {**self._near_scale(own.zero, low, spec.range_zero),
                     **self._flushed(own.zero, expected)}, range_story,
                )  # fmt: skip
            span = spec.range_span(low, high, own.zero, scheme)
            expected = spec.scale_of(span, scheme)
            self._compare(
                "scale", own.scale, expected,
                {**self._near_scale(own.scale, span, spec.scale_of),
                 **self._flushed(own.scale, expected)}, range_story,
            )  # fmt: skip
        else:  # the encoder's choice (S4), but not just anything
            if not scheme.symmetric:
                self._storable("zero", own.zero)
            self._storable("scale", own.scale)
        if not (np.isfinite(own.scale).all() and np.isfinite(own.zero).all()):
            raise _Wrong

        def code(d: Array, s: Array, z: Array, c: Array, n: Array) -> Array:
            return np.asarray(spec.without_codes(spec.code(d, s, z, scheme), c, n))

        codes = each(
            code, directions, own_scale, own_zero, of_blocks(coded), of_tokens(norm, axis=-1)
        )
        scale, zero = (self._each_token(part, rows) for part in (own.scale, own.zero))
        self._compare(
            "codes", own.codes, codes,
            self._near_tie(own.codes, codes, direction, scale, zero) if latitudes.tie_ulp else {},
            lambda at: self._code_story(x, norm, direction, scale, zero, at),
            what=self._code_words(own.codes, codes),
        )  # fmt: skip
        if self.verdict.findings and _renamed(own.codes, codes):
            last = self.verdict.findings[-1]
            if last.stage == "codes":
                self.verdict.findings[-1] = replace(last, rule="P1")
        lowest, highest = scheme.code_range
        if (own.codes < lowest).any() or (own.codes > highest).any():
            raise _Wrong
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
                {**self._near_norm(own.norm, gain), **self._flushed(own.norm, expected)},
                lambda at: iter([
                    ("norm", _text(norm[at])),
                    ("||y||", _text(reference.rounding.norm(y)[at])),
                    ("gain", _text(np.float32(gain[at]))),
                ]),
            )  # fmt: skip

    def _each_token(self, part: Array, rows: list[slice]) -> Array:
        """Scales or zeros, one for each token."""
        if self.scheme.axis == "token":
            return part
        counts = [one.stop - one.start for one in rows]
        return np.repeat(part, counts, axis=-2)

    def _near_norm(self, got: Array, exact: Array) -> dict[str, Array]:
        steps = self.latitudes.norm_ulp
        if not steps:
            return {}
        dtype = FLOAT_DTYPES[self.scheme.norm_dtype]
        near = np.zeros(got.shape, bool)
        for step in range(-steps, steps + 1):
            moved = self.reference.rounding.narrow(_moved(exact, step), dtype)
            near |= _bits(got) == _bits(moved)
        return {"norm-ulp": near}

    def _near_scale(self, got: Array, wide: Array, rule: Callable[..., Array]) -> dict[str, Array]:
        """Scales of directions that err because their norms do."""
        steps = self.latitudes.norm_ulp
        if not steps or not self.scheme.separate_norm:
            return {}
        ends = np.stack([rule(_moved(wide, s), self.scheme) for s in (-2 * steps, 2 * steps)])
        return {"norm-ulp": (got >= ends.min(axis=0)) & (got <= ends.max(axis=0))}

    def _near_tie(
        self, got: Array, expected: Array, direction: Array, scale: Array, zero: Array
    ) -> dict[str, Array]:
        near = np.zeros(got.shape, bool)
        for at in zip(*np.nonzero(np.abs(got - expected) == 1), strict=True):
            d, s, z = _element(direction, scale, zero, at)
            if s == 0:
                continue
            tie = np.float32(int(got[at]) + int(expected[at])) / np.float32(2)
            quotient = np.float32(d - z) / s
            on_it = (Fraction(float(d)) - Fraction(float(z))) / Fraction(float(s)) == Fraction(
                float(tie)
            )
            steps = abs(_ordered(quotient) - _ordered(tie))
            near[at] = not on_it and steps <= self.latitudes.tie_ulp
        return {"tie-ulp": near}

    def _code_words(self, got: Array, expected: Array) -> str:
        off = np.abs(got.astype(int) - expected)
        if not off.any():
            return ""
        most = int(off.max())
        return "codes differ, by one at most" if most == 1 else f"codes differ, by up to {most}"

    def _norm_story(self, x: Array, norm: Array, at: tuple[int, ...]) -> Iterator[tuple[str, str]]:
        exact = sum((Fraction(float(v)) ** 2 for v in x[at]), Fraction())
        yield "sum of squares", f"{float(exact)!r}"
        yield "norm in float32", _text(norm[at])

    def _code_story(
        self, x: Array, norm: Array, direction: Array, scale: Array, zero: Array,
        at: tuple[int, ...],
    ) -> Iterator[tuple[str, str]]:  # fmt: skip
        d, s, z = _element(direction, scale, zero, at)
        yield "x", _text(x[at])
        if self.scheme.separate_norm:
            yield "norm", _text(norm[at[:-1]])
            yield "direction", _text(d)
        yield "scale", _text(scale[_place(scale, at)])
        if not self.scheme.symmetric:
            yield "zero", _text(zero[_place(zero, at)])
        if s == 0:
            yield "quotient", "none: the scale is 0"
            return
        quotient = np.float32(d - z) / s
        words = _text(quotient)
        if np.isfinite(quotient):
            doubled = 2 * float(quotient)
            if doubled == int(doubled) and int(doubled) % 2:
                words += "  (a tie)"
        yield "quotient", words

    # --- decode

    def _decode(self) -> None:
        inputs, scheme = self.case.inputs, self.scheme
        shape = tuple(inputs["shape"].tolist())
        parts = {name: part for name, part in inputs.items() if name != "shape"}
        layout = {"x_hat": Field(shape, np.dtype(np.float32))}
        got = self._structure(layout)["x_hat"]
        expected = self.reference.model.decode(parts, scheme, shape)
        allowed = self._flushed(got, expected)
        if (steps := self.latitudes.gain_folding) and np.isfinite(got).all():
            far = np.abs(_ordered(got) - _ordered(expected))
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
            yield "sink", _text(parts["sinks"][at])
            return
        block = self.reference.model.block_of(parts, scheme, int(shape[-1]))
        rows = spec.block_slices(block.codes.shape[-2], scheme)
        scale, zero = (self._each_token(part, rows) for part in (block.scale, block.zero))
        token, element = (*lead, t), (*lead, t, j)
        yield "code", str(block.codes[element])
        yield "scale", _text(scale[_place(scale, element)])
        if not scheme.symmetric:
            yield "zero", _text(zero[_place(zero, element)])
        if not scheme.separate_norm:
            return
        if scheme.magnitude == "norm":
            block_at = (*lead, next(b for b, one in enumerate(rows) if one.start <= t < one.stop))
            y = spec.dequantized_direction(
                *(part[token][None] for part in (block.codes, scale, zero)),
                block.outlier_index[block_at][None], block.outliers[token][None],
            )  # fmt: skip
            yield "y", _text(y[0, j])
            yield "||y||", _text(self.reference.rounding.norm(y)[0])
        yield ("norm" if scheme.magnitude == "norm" else "gain"), _text(block.norm[token])

    # --- caches

    def _stream(self) -> None:
        inputs = self.case.inputs
        expected = self.reference.model.stream(
            inputs["x"], self.scheme, inputs["steps"], int(inputs["row"].item())
        )
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
                    rule = self._flag_rule(("B1", "B2", "C1", "K1"))
                    self.verdict.findings[i] = replace(self.verdict.findings[i], rule=rule)

    def _history(self) -> tuple[tuple[str, str], ...]:
        """What the row of a cache went through."""
        if self.case.operation != "stream":
            return ()
        inputs = self.case.inputs
        steps = inputs["steps"][:, [0, 1 + int(inputs["row"].item())]].tolist()
        words = []
        for (kind, count), same in itertools.groupby(map(tuple, steps)):
            times = len(list(same))
            step = f"append {count}" if kind == APPEND else f"crop to {count}"
            words.append(step if times == 1 else f"{times} times {step}")
        return (("steps", ", ".join(words)),)

    # --- attention

    def _attend(self) -> None:
        inputs, spec = self.case.inputs, self.reference
        query = inputs["query"]
        sides = []
        for side, scheme in (("keys", self.scheme), ("values", scheme_of(inputs["value_scheme"]))):
            parts = {
                name.partition(".")[2]: part
                for name, part in inputs.items()
                if name.startswith(f"{side}.") and not name.endswith(".shape")
            }
            shape = tuple(inputs[f"{side}.shape"].tolist())
            decoded = spec.model.decode(parts, scheme, shape)
            sides.append((decoded, _quantized(parts, scheme, shape)))
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
                index=index, got=_text(got[index]), expected=repr(float(expected[index])),
                shown=(("tolerance", f"{bound[index]:.3g}"), ("times it", f"{far[index]:.3g}")),
                wrong=int(wrong.sum()), of=wrong.size,
            )  # fmt: skip


# --- arrays -------------------------------------------------------------------------------------


def _quantized(parts: Mapping[str, Any], scheme: Scheme, shape: tuple[int, ...]) -> Quantized:
    sinks = parts.get("sinks")
    dtype = np.dtype(np.float32) if sinks is None else sinks.dtype
    return Quantized(scheme, shape, dtype, **parts)


def _bits(array: Array) -> Array:
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    return np.ascontiguousarray(array).view(f"u{array.itemsize}").astype(np.int64)


def _is_subnormal(array: Array) -> Array:
    info = {2: 0x0400, 4: 0x00800000}[array.itemsize]
    least = 0x0080 if array.dtype.name == "bfloat16" else info
    size = _bits(array) & ((1 << (8 * array.itemsize - 1)) - 1)
    return np.asarray((size > 0) & (size < least))


def _first(wrong: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def _ordered(value: Any) -> Any:
    """The place of a float32 among all of them, as an integer."""
    bits = np.asarray(value, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _moved(value: Array, steps: int) -> Array:
    """Float32 so many steps away; zero stays."""
    bits = np.asarray(value, np.float32).view(np.int32)
    return np.where(value == 0, value, (bits + steps).astype(np.int32).view(np.float32))


def _place(part: Array, at: tuple[int, ...]) -> tuple[int, ...]:
    """Where the scale of an element lies: axes of length 1 hold one for all."""
    return tuple(0 if size == 1 else i for i, size in zip(at, part.shape, strict=True))


def _element(
    direction: Array, scale: Array, zero: Array, at: tuple[int, ...]
) -> tuple[np.float32, np.float32, np.float32]:
    return (
        np.float32(direction[at]),
        np.float32(scale[_place(scale, at)]),
        np.float32(zero[_place(zero, at)]),
    )


def _text(value: Any) -> str:
    """A number as its bits and in decimal; integers as they are."""
    value = np.asarray(value)
    if value.dtype.kind in "iu":
        return str(int(value))
    bits = int(value.reshape(1).view(f"u{value.itemsize}")[0])
    return f"0x{bits:0{2 * value.itemsize}x}  {float(value)!r}"


def _renamed(got: Array, expected: Array) -> bool:
    """Whether every code is stored, most of them wrongly, as one other code."""
    pairs = np.unique(np.stack([expected.ravel(), got.ravel()]), axis=1)
    kinds = [len(np.unique(side)) for side in pairs]
    different = int((pairs[0] != pairs[1]).sum())
    return bool(kinds[0] == kinds[1] == pairs.shape[1] >= 4 and 2 * different > pairs.shape[1])
