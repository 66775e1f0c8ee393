"""The engineered cases of the kit: that they build, and that wrong arithmetic shows on them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsq_ref import KVCache, Scheme, attention, codec, quantize, rounding, spec
from nsq_ref.conformance import model
from nsq_ref.conformance.cases import cases
from nsq_ref.conformance.cases.encode import refusal
from nsq_ref.conformance.cases.flags import FLAGS
from nsq_ref.conformance.operations import OPTIONAL, Case, scheme_of
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.scheme import scheme_names
from tests.support.cases import cases_of

SPEC = (Path(__file__).parents[4] / "docs" / "spec.md").read_text(encoding="utf-8")
VARIANTS: dict[str, Scheme] = {
    "gain": Scheme(magnitude="gain"),
    "lsq": Scheme(magnitude="lsq", bits=3, norm_dtype="float32"),
    "lsq float32": Scheme(magnitude="lsq", scale_dtype="float32", norm_dtype="float32"),
    "float32": Scheme(scale_dtype="float32", norm_dtype="float32"),
    "bfloat16": Scheme(scale_dtype="bfloat16", norm_dtype="bfloat16", symmetric=False),
    "plain float32": Scheme(separate_norm=False, symmetric=False, scale_dtype="float32"),
    "plain bfloat16": Scheme(
        separate_norm=False, axis="token", outlier_channels=2, scale_dtype="bfloat16"
    ),
    "blocks of 1": Scheme(block_size=1),
    "blocks of 1, plain": Scheme(block_size=1, symmetric=False, separate_norm=False),
    "blocks of 5": Scheme(block_size=5, sink_tokens=3, magnitude="gain"),
    "blocks of 5, plain": Scheme(block_size=5, sink_tokens=1, separate_norm=False),
    "blocks of 2 a token": Scheme(block_size=2, sink_tokens=1, axis="token", symmetric=False),
    "balanced": Scheme(
        norm_rule="balanced", magnitude="gain", block_size=5, sink_tokens=1, norm_dtype="bfloat16"
    ),
    "search": Scheme(scale_rule="search"),
    "search a token": Scheme(scale_rule="search", axis="token", symmetric=False, bits=2),
    "one outlier": Scheme(outlier_channels=1, symmetric=False),
    "nine outliers": Scheme(outlier_channels=9, bits=8, symmetric=False, block_size=5),
}
SCHEMES: dict[str, Scheme] = {name: Scheme.named(name) for name in scheme_names()} | VARIANTS


def built(name: str) -> list[Case]:
    return cases_of(SCHEMES[name])


def digest(some: list[Case]) -> str:
    sha = hashlib.sha256()
    for case in sorted(some, key=lambda case: (case.operation, case.id)):
        sha.update(f"{case.operation} {case.id} {case.flags} {case.refused_by}".encode())
        for name, array in case.inputs.items():
            sha.update(f"{name} {array.dtype} {array.shape}".encode())
            sha.update(array.tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("operations", [["encode"], ["stream", "decode"]])
def test_cases_that_tests_share_are_those_of_the_kit(operations: list[str]) -> None:
    for options in ((), (3,), (0, ["float16"])):
        shared = cases_of("naive2", operations, *options)
        assert digest(shared) == digest(cases("naive2", operations, *options))


# --- what holds for every scheme ----------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_cases_are_as_declared(name: str) -> None:
    """I2 N1 M4 S5 O1 D3. Every case is accepted or refused as it says."""
    some = built(name)
    assert len({(case.operation, case.id) for case in some}) == len(some)
    for case in some:
        assert case.flags
        assert case.flags[0] == case.id.split("/")[0]
        assert set(case.flags) <= set(FLAGS)
        if case.operation == "stream" and case.refused_by is not None:
            x, sinks = case.inputs["x"][0], case.scheme.sink_tokens
            block = case.scheme.block_size or 0
            rule = refusal(x, case.scheme)
            assert (
                case.refused_by
                == rule
                == (rule if rule == "I2" else refusal(x[: sinks + block], case.scheme))
            )  # in a block that is sealed
        elif case.operation != "encode":
            assert case.refused_by is None
        elif case.refused_by is None:
            if case.recipe is None:  # the large ones lie far from any end
                quantize(case.inputs["x"], case.scheme, "numpy")
        else:
            with pytest.raises(ValueError, match=r"not finite|beyond|is (nan|inf|-inf)"):
                quantize(case.inputs["x"], case.scheme, "numpy")
    operations = {case.operation for case in some}
    expected = {"encode", "decode", "attend"}
    assert operations == (expected | {"stream"} if SCHEMES[name].block_size else expected)


def test_flags_cite_rules() -> None:
    """Every flag is about a rule of the specification, and some scheme has a case of it."""
    rules = set(re.findall(r"^\*\*([A-Z][0-9])\.", SPEC, re.MULTILINE))
    assert {flag.rule for flag in FLAGS.values()} <= rules
    used = {flag for name in SCHEMES for case in built(name) for flag in case.flags}
    for name in ("one outlier", "streaming4", "gain", "balanced"):
        used |= {flag for case in cases_of(SCHEMES[name], OPTIONAL) for flag in case.flags}
    searched = replace(SCHEMES["search"], bits=2, block_size=24)
    used |= {flag for case in cases_of(searched, ["stream_feedback"]) for flag in case.flags}
    assert used == set(FLAGS)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("nsep+pchan4", {"I2", "N1", "M4"}),
        ("float32", {"I2", "N1"}),
        ("pchan4", {"I2", "S5"}),
        ("outlier4", {"I2", "O1"}),
        ("plain float32", {"I2", "S5"}),
        ("blocks of 5", {"I2", "N1", "M4"}),
    ],
)
def test_refusals(name: str, rules: set[str]) -> None:
    """I2 N1 M4 S5 O1. Each refusal that a scheme can meet is asked for."""
    assert {case.refused_by for case in built(name)} == rules | {None}


def test_decoded_overflow() -> None:
    """D3. A scheme of wide scales is asked for values that would decode to infinity."""
    some = cases(Scheme(separate_norm=False, bits=3, scale_dtype="bfloat16"), ["encode"])
    assert {case.refused_by for case in some if case.flags[0] == "decoded-overflow"} == {None, "D3"}


@pytest.mark.parametrize(
    "name", ["nsep+pchan4", "streaming4", "outlier3", "bfloat16", "search", "balanced"]
)
def test_backends_agree(name: str) -> None:
    """N1 N3 Q1 D1. The oracle and the kernels give the bytes of the specification."""
    accepted = [case for case in built(name) if case.operation == "encode" and not case.refused_by]
    small = [case for case in accepted if 0 < case.inputs["x"].size <= 150]
    for case in small[::9]:
        x = case.inputs["x"]
        expected, *others = (quantize(x, case.scheme, b) for b in ("numpy", "numba", "oracle"))
        for other in others:
            for part, theirs in other.parts.items():
                assert theirs.tobytes() == expected.parts[part].tobytes(), (case.id, part)


# --- the same everywhere, and for ever ----------------------------------------------------------


def test_deterministic() -> None:
    """Two builds are equal, another seed is not, and ids do not depend on either."""
    scheme = Scheme(block_size=5, sink_tokens=1)
    first, second, other = cases(scheme), cases(scheme), cases(scheme, seed=1)
    assert digest(first) == digest(second) != digest(other)
    engineered = {"exact-tie", "norm-overflow", "negative-zero"}
    same = [
        digest(
            [case for case in some if case.flags[0] in engineered and case.operation == "encode"]
        )
        for some in (first, other)
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("name", "pinned"),
    [
        ("nsep+pchan4", "059000a058e77e10"),
        ("streaming4", "b31b26668a6af6af"),
        ("nsep+out4", "2f0c05cb4471517c"),
        ("naive2", "2706017c5d12be1a"),
        ("bfloat16", "2768cba613978e08"),
        ("balanced", "8eee0218aaac45a9"),
        ("search", "393a05bf7aca38d5"),
    ],
)
def test_pinned(name: str, pinned: str) -> None:
    """Cases are the same with every version of NumPy."""
    assert digest(built(name))[:16] == pinned


def test_operations_and_dtypes_only_leave_out() -> None:
    """I1. What is left out changes no other case."""
    scheme = SCHEMES["blocks of 5"]
    whole = {(case.operation, case.id): digest([case]) for case in built("blocks of 5")}
    for chosen in (cases(scheme, ["decode"]), cases(scheme, dtypes=["float32"])):
        assert 0 < len(chosen) < len(whole)
        for case in chosen:
            assert whole[case.operation, case.id] == digest([case])
    kinds = {case.inputs["x"].dtype.name for case in built("blocks of 5") if "x" in case.inputs}
    assert kinds == {"float32", "float16", "bfloat16"}


# --- ties ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nsep+pchan4", "nsep4", "naive3", "nsep+out2", "bfloat16", "blocks of 5", "nsep8"]
)
def test_exact_ties(name: str) -> None:
    """N1 N2 Q1. Ties are ties in real numbers: no operation before the rounding rounds."""
    scheme = SCHEMES[name]
    (case, *_) = [case for case in built(name) if case.id == "exact-tie/0"]
    x = case.inputs["x"][scheme.sink_tokens :]
    block = spec.encode_blocks(x, scheme)
    norm = rounding.norm(x).astype(np.float64) if scheme.separate_norm else np.ones(len(x))
    exact = np.sum(x.astype(np.float64) ** 2, axis=-1) == norm**2
    assert exact.all() or not scheme.separate_norm
    assert set(np.frexp(norm)[0]) == {0.5}
    blocks = np.arange(len(x)) // scheme.tokens_per_block(len(x))
    pick = blocks if scheme.axis == "channel" else np.arange(len(x))
    scale, zero = (part[pick].astype(np.float64) for part in (block.scale, block.zero))
    coded = np.broadcast_to(scale != 0, x.shape).copy()
    quotient = (x / norm[:, None] - zero) / np.where(coded, scale, np.inf)
    for t in range(len(x)):
        coded[t, block.outlier_index[blocks[t]]] = False
    halves = coded & (np.abs(quotient % 1 - 0.5) == 0)
    low, high = scheme.code_range
    ties = {float(q) for q in quotient[halves]}
    assert min(ties) == low + 0.5
    assert max(ties) == high - 0.5
    if scheme.bits < 8:
        assert {tie for tie in ties if low <= tie <= high} == {k + 0.5 for k in range(low, high)}


# --- balanced norms -----------------------------------------------------------------------------


def choices(x: Any, scheme: Scheme) -> set[bool]:
    """Whether blocks of this input have balanced norms: some, none, or both."""
    wide = x[..., scheme.sink_tokens :, :].astype(np.float32)
    found = [
        spec.norms_and_sizes(wide[..., rows, :], scheme)[1] != 1
        for rows in spec.block_slices(wide.shape[-2], scheme)
    ]
    return {bool(one) for taken in found for one in np.any(taken, axis=(-2, -1)).reshape(-1)}


def test_balanced_cases() -> None:
    """N3. The choice is what the flag says, in every dtype; near-ties of other rules are plain."""
    scheme = SCHEMES["balanced"]
    some = [c for c in built("balanced") if c.operation == "encode" and c.refused_by is None]
    by_flag: dict[str, list[set[bool]]] = {}
    for case in some:
        if case.inputs["x"].shape[-2] > scheme.sink_tokens and case.inputs["x"].size < 10_000:
            by_flag.setdefault(case.flags[0], []).append(choices(case.inputs["x"], scheme))
    for flag in ("outlier-pair", "size-bound"):
        assert len(by_flag[flag]) >= 9, flag
        assert all(taken == {True} for taken in by_flag[flag]), flag
    for flag in ("offset-channel", "half-even", "reciprocal-of-norm", "norm-epsilon"):
        assert all(taken == {False} for taken in by_flag[flag]), flag
    assert all(taken == {True, False} for taken in by_flag["balanced-choice"])
    near = [taken for taken in by_flag["near-choice"] if taken == {True}]
    assert len(near) == 6  # one of each two that lie next to each other
    beyond = [c.inputs["x"] for c in some if c.flags[0] == "balanced-range"]
    assert any(
        np.isinf(
            spec.length_if_finite(x[1:] / spec.channel_sizes(np.abs(x[1:]).max(0))[None])
        ).any()
        for x in (one.astype(np.float32) for one in beyond)
    )


# --- wrong arithmetic ---------------------------------------------------------------------------


def where_zero(value: Any) -> Any:
    return np.where(value == 0, np.float32(np.inf), value)


def code_of(quotient: Callable[[Any, Any, Any], Any]) -> tuple[Any, str, Callable[..., Any]]:
    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        wide = quotient(direction, where_zero(scale.astype(np.float32)), zero.astype(np.float32))
        return np.clip(wide, *scheme.code_range).astype(np.float32)

    return spec, "code", code


def half_away(direction: Any, scale: Any, zero: Any) -> Any:
    quotient = ((direction - zero) / scale).astype(np.float64)
    return np.copysign(np.floor(np.abs(quotient) + 0.5), quotient)


def scale_before_narrowing(span: Any, scheme: Scheme) -> Any:
    return span / np.float32(scheme.code_range[1])


def direction_by(function: Callable[[Any, Any], Any]) -> tuple[Any, str, Callable[..., Any]]:
    return spec, "direction_of", lambda x, norm: function(x, where_zero(norm)[..., None])


def narrowed(norm: Any) -> Any:
    return where_zero(norm.astype(np.float16).astype(np.float32))


def in_order(x: Any) -> Any:
    return np.sqrt(np.add.accumulate(x * x, axis=-1)[..., -1])


def with_length(function: Callable[[Any, Any, Any], Any]) -> tuple[Any, str, Callable[..., Any]]:
    def reconstruct(y: Any, norm: Any, scheme: Scheme) -> Any:
        stored = norm.astype(np.float32)[..., None]
        if not scheme.separate_norm or scheme.magnitude != "norm":
            return stored * y
        return function(stored, y, where_zero(rounding.norm(y))[..., None]).astype(np.float32)

    return spec, "reconstruct", reconstruct


ENCODERS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "half-even": code_of(half_away),
    "reciprocal-of-scale": code_of(lambda d, s, z: np.rint((d - z) * (np.float32(1) / s))),
    "double-precision-quotient": code_of(lambda d, s, z: np.rint((d - z).astype(np.float64) / s)),
    "scale-epsilon": code_of(lambda d, s, z: np.rint((d - z) / (s + np.float32(1e-8)))),
    "reciprocal-of-norm": direction_by(lambda x, norm: x * (np.float32(1) / norm)),
    "norm-epsilon": direction_by(lambda x, norm: x / (norm + np.float32(1e-12))),
    "norm-before-narrowing": direction_by(lambda x, norm: x / narrowed(norm)),
    "merged-division": code_of(lambda d, s, z: np.rint(d / s - z / s)),
    "norm-accumulation": (rounding, "norm", in_order),
    "scale-narrowing": (
        spec,
        "range_span",
        lambda low, high, zero, scheme: np.maximum(high, -low) if scheme.symmetric else high - low,
    ),
}
DECODERS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "merged-decode": with_length(lambda norm, y, length: (norm / length) * y),
    "reciprocal-of-length": with_length(
        lambda norm, y, length: norm * (y * (np.float32(1) / length))
    ),
    "length-accumulation": with_length(
        lambda norm, y, length: norm * (y / where_zero(in_order(y))[..., None])
    ),
    "double-precision-decode": with_length(
        lambda norm, y, length: norm * (y.astype(np.float64) / length)
    ),
}

# Wrong arithmetic that gives the same in every case of a scheme, and so needs none.
EQUAL: dict[str, tuple[str, ...]] = {
    # A float32 quotient by a scale of 11 bits or less lands on a tie only if it is one.
    "double-precision-quotient": (
        "nsep+pchan4", "nsep4", "streaming4", "pchan2", "outlier8", "bfloat16", "blocks of 5",
    ),
    "scale-epsilon": ("nsep4",),  # its scales are too large for an epsilon of 1e-8
    "merged-division": ("nsep+pchan4", "nsep4", "pchan2", "outlier8", "float32", "blocks of 5"),
    # Symmetric schemes have no minimum, and a float32 minimum is not rounded.
    "scale-narrowing": (
        "nsep+pchan4", "nsep4", "pchan2", "outlier8", "float32", "blocks of 5", "plain float32",
    ),
}  # fmt: skip
NORMED = ("nsep+pchan4", "nsep4", "streaming4", "float32", "bfloat16", "blocks of 5")


def answers(some: list[Case]) -> list[Any]:
    return [
        part
        for case in some
        for part in (
            quantize(case.inputs["x"], case.scheme, "numpy").parts.values()
            if case.operation == "encode"
            else [decoded(case)]
        )
    ]


def decoded(case: Case) -> Any:
    parts = {name: part for name, part in case.inputs.items() if name != "shape"}
    return model.decode(parts, case.scheme, tuple(case.inputs["shape"].tolist()))


def differences(some: list[Case], patch: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    expected = answers(some)
    with monkeypatch.context() as patched, np.errstate(all="ignore"):
        patched.setattr(*patch)
        got = answers(some)
    return sum(int(np.sum(a != b)) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("flag", ENCODERS)
@pytest.mark.parametrize("name", [*NORMED, "pchan2", "outlier8", "plain float32"])
def test_wrong_encoders_show(name: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """N1 N2 Q1 S2 S3. Each changes three elements at least of the cases that are about it."""
    some = [case for case in built(name) if case.operation == "encode" and case.flags[0] == flag]
    if "norm" in flag and name not in NORMED:
        assert not some
    elif name not in EQUAL.get(flag, ()):
        assert differences(some, ENCODERS[flag], monkeypatch) >= 3


@pytest.mark.parametrize("flag", DECODERS)
@pytest.mark.parametrize("name", ["nsep+pchan4", "nsep4", "nsep+out2", "bfloat16", "float32"])
def test_wrong_decoders_show(name: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1. Each changes three elements at least of the cases that are about it."""
    some = [case for case in built(name) if case.operation == "decode" and case.flags[0] == flag]
    assert differences(some, DECODERS[flag], monkeypatch) >= 3


@pytest.mark.parametrize("norm_dtype", FLOAT_DTYPES)
def test_norm_midpoints(norm_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """N1. A float64 sum alone stores another norm."""
    some = cases(Scheme(norm_dtype=norm_dtype), ["encode"])
    some = [case for case in some if case.flags[0] == "norm-midpoint"]

    def norm(x: Any) -> Any:
        return np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=-1)).astype(np.float32)

    stored = [quantize(case.inputs["x"], case.scheme, "numpy").norm for case in some]
    monkeypatch.setattr(rounding, "norm", norm)
    wrong = [quantize(case.inputs["x"], case.scheme, "numpy").norm for case in some]
    assert sum(int(np.sum(a != b)) for a, b in zip(stored, wrong, strict=True)) >= 2


# --- caches and attention -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["blocks of 5", "blocks of 1", "blocks of 2 a token", "streaming4"]
)
def test_stream_cases(name: str) -> None:
    """B1 B2 C1 K1. A real cache lives through the steps and stores what the model says."""
    for case in built(name):
        if case.operation != "stream":
            continue
        x, steps, row = case.inputs["x"], case.inputs["steps"], int(case.inputs["row"].item())
        rows, _, head_dim = x.shape
        if case.refused_by is not None:
            cache = KVCache(1, 1, head_dim, case.scheme, case.scheme, dtype=x.dtype)
            with pytest.raises(ValueError, match=r"not finite|beyond|is (nan|inf|-inf)"):
                cache.append(x[:, None], x[:, None])
            assert cache.lengths[0] == 0
            continue
        cache = KVCache(rows, 1, head_dim, case.scheme, case.scheme, dtype=x.dtype)
        taken = np.zeros(rows, int)
        for kind, *numbers in steps.tolist():
            if kind == model.CROP:
                cache.crop(numbers)
                continue
            padded = np.zeros((rows, 1, max(numbers), head_dim), x.dtype)
            for n, count in enumerate(numbers):
                padded[n, 0, :count] = x[n, taken[n] : taken[n] + count]
            cache.append(padded, padded, lengths=numbers)
            taken += numbers
        stored = {part: array[0] for part, array in cache.stored(row).keys.arrays.items()}
        expected = model.stream(x, case.scheme, steps, row)
        expected = {part: array for part, array in expected.items() if array.size}
        stored.pop("collapsed", None)
        assert stored.keys() == expected.keys(), case.id
        for part, array in expected.items():
            assert stored[part].tobytes() == array.tobytes(), (case.id, part)


def test_crops_saturate() -> None:
    """C1. Where a scheme can decode beyond float16, a crop is asked for that does."""
    for name in ("streaming4", "streaming8", "blocks of 5, plain"):
        (case,) = [case for case in built(name) if case.flags[0] == "crop-saturation"]
        x, steps = case.inputs["x"], case.inputs["steps"]
        tail = model.stream(x, case.scheme, steps, 0)["tail"]
        assert np.isfinite(tail).all()
        assert np.max(np.abs(tail)) == 65504


@pytest.mark.parametrize("name", ["nsep+pchan4", "streaming3", "outlier4", "blocks of 5"])
def test_attend_cases(name: str) -> None:
    """A1 A2. All of them can be attended to, and heads, masks and windows of all kinds occur."""
    seen = set()
    for case in built(name):
        if case.operation != "attend":
            continue
        given = case.inputs
        sides = []
        for side, scheme in (("keys", case.scheme), ("values", scheme_of(given["value_scheme"]))):
            parts = {
                part.split(".")[1]: array for part, array in given.items() if side + "." in part
            }
            shape = tuple(parts.pop("shape").tolist())
            kind = np.dtype(np.float32)
            sides.append(codec.dequantize(codec.Quantized(scheme, shape, kind, **parts)))
        result = attention.attend(
            given["query"][None], sides[0][None], sides[1][None],
            scale=given["scale"].item(), causal=bool(given["causal"].item()),
            softcap=given["softcap"].item() or None,
            sliding_window=given["sliding_window"].item() or None,
        )  # fmt: skip
        assert np.isfinite(result.output).all()
        seen.add(len(given["query"]) // len(sides[0]))
    assert seen >= {1, 4}


# --- what cases are made for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "most"), [("block_size", 4096), ("sink_tokens", 256), ("outlier_channels", 256)]
)
def test_schemes_that_are_too_large_are_refused(field: str, most: int) -> None:
    """By name, before memory is asked for, whether a frame could hold the number or not."""
    for number in (most + 1, 2**31, 2**40, 2**63):
        with pytest.raises(ValueError, match=f"^{field}={number} is more than cases are made for"):
            cases(Scheme(**{field: number}))  # type: ignore[arg-type]


def test_cases_of_a_named_scheme() -> None:
    assert digest(cases("naive2")) == digest(cases(Scheme.named("naive2")))
    assert len(cases("nsep+pchan4-lsq", ["attend"])) == 43
    pair: Any = Scheme.named("KIVI-K2V4")
    with pytest.raises(TypeError, match="scheme is a pair"):
        cases(pair)
    with pytest.raises(ValueError, match="unknown scheme name 'nsep5'"):
        cases("nsep5")


@pytest.mark.parametrize("name", ["nsep+pchan4", "naive3", "pchan2", "outlier4", "float32"])
def test_decoders_are_asked_parts_of_which_the_sign_of_zero_follows(name: str) -> None:
    """D1 S1 Q1 Z1: in symmetric schemes code * scale is never -0 for parts that are asked.

    It would be for a negative code of scale 0, or a negative scale, which no encoder stores.
    """
    asked = [case for case in built(name) if case.operation == "decode"]
    assert asked
    for case in asked:
        assert case.scheme.symmetric
        scale, shape = case.inputs["scale"], case.inputs["shape"].tolist()
        parts = {n: part for n, part in case.inputs.items() if n not in ("shape", "sinks")}
        codes = codec.Quantized(case.scheme, tuple(shape), np.dtype(np.float32), **parts).codes
        wide = np.broadcast_to(scale.astype(np.float32), codes.shape)
        assert not np.signbit(scale).any()
        assert not codes[wide == 0].any()
        product = codes * wide
        assert not (np.signbit(product) & (product == 0)).any()
