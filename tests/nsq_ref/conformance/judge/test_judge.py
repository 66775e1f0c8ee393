"""Latitudes: what they let pass, what they never do, and that each use of one is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nsq_ref as nsq
from nsq_ref import Scheme, rounding, spec
from nsq_ref.conformance import as_text, check, model
from nsq_ref.conformance.judge import Latitudes
from nsq_ref.packing import pack
from nsq_ref.scheme import FLOAT_DTYPES
from tests.support.cases import small_cases_made_once

__all__ = ["small_cases_made_once"]  # the fixture

PAPER = Scheme()
WIDE = Scheme(scale_dtype="float32", norm_dtype="float32")


def folded(parts: Any, scheme: Scheme, shape: tuple[int, ...]) -> Any:
    """(norm / ||y||) * y, in place of norm * (y / ||y||)."""
    block = model.block_of(parts, scheme, shape[-1])
    y = spec.dequantized_direction(
        block.codes, block.scale, block.zero, block.outlier_index, block.outliers
    )
    factor = block.norm.astype(np.float32) / spec.where_zero(rounding.norm(y), np.inf)
    return factor[..., None] * y


def encoded(x: Any, scheme: Scheme, norm: Any = None, code: Any = None) -> Any:
    """A plain encoder of one block, with another norm or another rounding."""
    nsq.quantize(x, scheme)  # refuses what is to be refused
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        length = rounding.norm(x) if norm is None else norm(x)
        direction = x / spec.where_zero(length, np.inf)[..., None]
        coded = np.ones(x.shape, bool)
        scale, zero = spec.range_scale(*spec.extent(direction, coded, scheme), scheme)
        codes = (code or spec.code)(direction, scale, zero, scheme)
    codes = spec.without_codes(codes, coded, length)
    stored = rounding.narrow(length, FLOAT_DTYPES[scheme.norm_dtype])
    return {"packed": pack(codes, scheme), "scale": scale, "norm": stored}


def one_step_up(x: Any) -> Any:
    length = rounding.norm(x)
    most = np.finfo(np.float32).max
    return np.where(length == 0, length, np.nextafter(length, most))


def by_reciprocal(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
    scale = scale.astype(np.float32)
    reciprocal = np.float32(1) / np.where(scale == 0, np.float32(np.inf), scale)
    return np.clip(np.rint(direction * reciprocal), *map(np.float32, scheme.code_range))


def away(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
    quotient = direction / np.where(scale == 0, np.inf, scale).astype(np.float32)
    rounded = np.copysign(np.floor(np.abs(quotient).astype(np.float64) + 0.5), quotient)
    return np.clip(rounded, *scheme.code_range).astype(np.float32)


def flushed(part: Any) -> Any:
    tiny = {"float16": 2.0**-14, "float32": 2.0**-126}[part.dtype.name]
    return np.where(np.abs(part) < tiny, part.dtype.type(0), part)


def test_plain_encoder_is_right() -> None:
    """N1 N2 S1 Q1 P1 M1: what the tests below change is all that they change."""
    for scheme in (PAPER, WIDE):
        assert check(encoded, scheme=scheme, dtypes=["float32"]).conforms


def test_folded_gain_needs_its_latitude() -> None:
    """D1."""
    report = check(decode=folded, scheme=PAPER)
    assert not report.conforms
    assert report.schemes[0].diagnoses[0].rule == "D1"
    allowed = check(decode=folded, scheme=PAPER, latitudes=["gain-folding=2ulp"])
    assert allowed.conforms
    assert {one.latitude for one in allowed.schemes[0].explained} == {"gain-folding"}
    text = as_text(allowed)
    assert "gain-folding=2ulp" in text
    assert "exactly" in text  # a witness


def test_gain_folding_allows_no_more_than_it_says() -> None:
    """D1."""

    def off(parts: Any, scheme: Scheme, shape: tuple[int, ...]) -> Any:
        x_hat = model.decode(parts, scheme, shape)
        return np.where(x_hat == 0, x_hat, (x_hat.view(np.int32) + 3).view(np.float32))

    for steps, conforms in ((2, False), (3, True)):
        report = check(decode=off, scheme=PAPER, latitudes=[f"gain-folding={steps}"])
        assert report.conforms is conforms


def test_norms_one_step_off_need_their_latitude() -> None:
    """N1: stored in float32, they make the directions that codes are judged on."""

    def encode(x: Any, scheme: Scheme) -> Any:
        return encoded(x, scheme, norm=one_step_up)

    options: dict[str, Any] = {"scheme": WIDE, "dtypes": ["float32"]}
    assert check(encode, **options).schemes[0].diagnoses[0].rule == "N1"
    report = check(encode, **options, latitudes=["norm-ulp=1"])
    assert report.conforms, as_text(report)
    assert {one.latitude for one in report.schemes[0].explained} == {"norm-ulp"}


def test_norms_two_steps_off_are_beyond_one() -> None:
    """N1."""

    def encode(x: Any, scheme: Scheme) -> Any:
        return encoded(
            x,
            scheme,
            norm=lambda x: (
                np.nextafter(one_step_up(x), np.finfo(np.float32).max) * (rounding.norm(x) != 0)
            ),
        )

    options: dict[str, Any] = {"scheme": WIDE, "dtypes": ["float32"]}
    assert not check(encode, **options, latitudes=["norm-ulp=1"]).conforms
    assert check(encode, **options, latitudes=["norm-ulp=2"]).conforms


def test_reciprocal_needs_its_latitude() -> None:
    """Q1: near a tie a code may be one off, and the report shows such a code."""

    def encode(x: Any, scheme: Scheme) -> Any:
        return encoded(x, scheme, code=by_reciprocal)

    options: dict[str, Any] = {"scheme": PAPER, "dtypes": ["float32"]}
    assert check(encode, **options).schemes[0].diagnoses[0].rule == "Q1"
    report = check(encode, **options, latitudes=["tie-ulp=2"])
    left = [f for one in report.schemes[0].diagnoses for f in one.findings]
    # A quotient that is rounded onto a tie is allowed for; a tie itself is not.
    assert all("(a tie)" in dict(finding.shown)["quotient"] for finding in left)
    assert any(one.latitude == "tie-ulp" for one in report.schemes[0].explained)


def test_exact_ties_get_no_latitude() -> None:
    """Q1."""
    report = check(
        lambda x, scheme: encoded(x, scheme, code=away), scheme=PAPER, dtypes=["float32"],
        latitudes=["tie-ulp=100000"],
    )  # fmt: skip
    assert not report.conforms
    assert report.schemes[0].diagnoses[0].mistake == "half away from zero"


@pytest.mark.parametrize("scheme", [PAPER, Scheme(separate_norm=False)])
def test_flushed_subnormals_need_their_latitude(scheme: Scheme) -> None:
    """S3 M1: what follows is judged on the scale that was flushed."""

    def encode(x: Any, scheme: Scheme) -> Any:
        x_float32 = x.astype(np.float32)
        parts = dict(nsq.quantize(x, scheme).parts)
        scale = flushed(parts["scale"])
        with np.errstate(all="ignore"):
            norm = rounding.norm(x_float32)
            norm = norm if scheme.separate_norm else np.ones_like(norm)
            codes = spec.code(spec.direction_of(x_float32, norm), scale, 0 * scale, scheme)
        parts["packed"] = pack(spec.without_codes(codes, np.True_, norm), scheme)
        parts["scale"] = scale
        if scheme.separate_norm:
            parts["norm"] = flushed(parts["norm"])
        return parts

    assert not check(encode, scheme=scheme).conforms
    report = check(encode, scheme=scheme, latitudes=["flush-subnormals"])
    assert report.conforms, as_text(report)
    assert {one.latitude for one in report.schemes[0].explained} == {"flush-subnormals"}


@pytest.mark.parametrize(("value", "rule"), [(np.inf, "S5"), (-0.0, "Z1")])
def test_a_searched_scale_is_not_just_anything(value: float, rule: str) -> None:
    """S4 S5 Z1: the choice is the encoder's, but it must be one that can be stored."""

    def encode(x: Any, scheme: Scheme) -> Any:
        parts = dict(nsq.quantize(x, scheme).parts)
        scale = parts["scale"].copy()
        scale[..., -1] = value
        return {**parts, "scale": scale}

    report = check(encode, scheme=Scheme(scale_rule="search"), dtypes=["float32"])
    assert not report.conforms
    assert rule in {one.rule for one in report.schemes[0].diagnoses}


@pytest.mark.parametrize(
    "name", ["tie-ulp", "tie-ulp=0", "tie-ulp=-1", "tie-ulp=x", "flush-subnormals=1", "ulp=1", ""]
)
def test_latitudes_are_read_strictly(name: str) -> None:
    with pytest.raises(ValueError, match="latitude"):
        Latitudes.parse([name])


@pytest.mark.parametrize("names", [
    ["norm-ulp=1", "norm-ulp=3"], ["flush-subnormals", "flush-subnormals"],
    ["gain-folding=2", "tie-ulp=1", "gain-folding=2ulp"],
])  # fmt: skip
def test_a_latitude_is_given_once(names: list[str]) -> None:
    """Of two numbers, one would have no effect."""
    with pytest.raises(ValueError, match=f"latitude {names[0].partition('=')[0]} is given twice"):
        Latitudes.parse(names)
