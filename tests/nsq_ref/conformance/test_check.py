"""The kit is tested by ports: right ones pass, and each wrong decision is found and named.

The ports are those of `wrong_ports`, which know nothing of the kit's own table of mistakes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

import nsq_ref as nsq
from nsq_ref import Scheme, scheme_names
from nsq_ref.conformance import as_json
from nsq_ref.conformance.check import check
from nsq_ref.conformance.findings import Diagnosis, Report
from nsq_ref.conformance.operations import CASE_DTYPES
from tests.support.cases import cases_of, checking, small_cases_made_once
from tests.support.wrong_ports import RIGHT, Knobs, Port

__all__ = ["small_cases_made_once"]  # the fixture

# Narrow blocks, so that what belongs to a block shows in few tokens.
CACHE = Scheme(symmetric=False, magnitude="lsq", block_size=4, sink_tokens=2)
SCHEMES = {
    "paper": Scheme(),
    "gain": Scheme(magnitude="gain"),
    "lsq": Scheme(magnitude="lsq"),
    "wide lsq": Scheme(magnitude="lsq", scale_dtype="float32"),
    "wide": Scheme(scale_dtype="float32", norm_dtype="float32"),
    "bfloat16": Scheme(scale_dtype="bfloat16", norm_dtype="bfloat16"),
    "asymmetric": Scheme(symmetric=False),
    "wide asymmetric": Scheme(symmetric=False, scale_dtype="float32", norm_dtype="float32"),
    "asymmetric tokens": Scheme(symmetric=False, axis="token"),
    "asymmetric vectors": Scheme(symmetric=False, separate_norm=False),
    "asymmetric outliers": Scheme(symmetric=False, axis="token", outlier_channels=2),
    "outliers by channel": Scheme(outlier_channels=2),
    "blocks": Scheme(block_size=4, sink_tokens=2),
    "outliers in blocks": Scheme(outlier_channels=2, block_size=4),
    "cache": CACHE,
    "plain cache": Scheme(block_size=4, sink_tokens=1),
    "balanced": Scheme(norm_rule="balanced", magnitude="gain"),
    "balanced blocks": Scheme(
        norm_rule="balanced", magnitude="lsq", symmetric=False, block_size=4, sink_tokens=1,
        outlier_channels=1, norm_dtype="bfloat16",
    ),
    "search": Scheme(scale_rule="search"),
    "asymmetric search": Scheme(scale_rule="search", symmetric=False, axis="token"),
    "vectors bfloat16": Scheme(separate_norm=False, scale_dtype="bfloat16"),
    "asymmetric vectors bfloat16": Scheme(
        separate_norm=False, symmetric=False, scale_dtype="bfloat16"
    ),
    "everything": Scheme(
        bits=3, symmetric=False, magnitude="gain", block_size=3, sink_tokens=1, outlier_channels=2,
        scale_dtype="bfloat16", norm_dtype="float32",
    ),
    **{name: Scheme.named(name) for name in scheme_names()},
}  # fmt: skip


def report_on(
    knobs: Knobs, scheme: Scheme, operations: Sequence[str], dtypes: Sequence[str] = CASE_DTYPES
) -> Report:
    port = Port(knobs)
    chosen: dict[str, Any] = {name: getattr(port, name) for name in operations}
    return check(**chosen, scheme=scheme, dtypes=dtypes)


def diagnoses(report: Report) -> Sequence[Diagnosis]:
    return report.schemes[0].diagnoses


# --- right ports --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_a_port_from_the_text_alone_conforms(name: str) -> None:
    """I1 I2 K1 B1 N1 N2 N3 O1 S1 S2 S3 S4 S5 Z1 Q1 Q2 P1 M1 M2 M3 M4 D1 D3."""
    report = report_on(RIGHT, SCHEMES[name], ("encode", "decode"))
    assert report.conforms, [(d.rule, d.says) for d in diagnoses(report)]
    assert not report.schemes[0].explained


@pytest.mark.parametrize("name", ["nsep+out4", "everything"])
def test_a_port_from_the_text_alone_conforms_on_large_cases(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1 N1 B1 B2. Lone extremes at the edges of tiles."""
    monkeypatch.setattr(
        checking, "cases",
        lambda *given: [one for one in cases_of(*given) if 10_000 < one.inputs["x"].size < 40_000],
    )  # fmt: skip
    assert report_on(RIGHT, SCHEMES[name], ("encode",), ("float32",)).conforms


@pytest.mark.parametrize(
    "name", ["cache", "plain cache", "balanced blocks", "everything", "streaming4", "streaming2"]
)
def test_a_cache_from_the_text_alone_conforms(name: str) -> None:
    """B1 B2 C1 K1."""
    report = report_on(RIGHT, SCHEMES[name], ("stream",))
    assert report.conforms, [(d.rule, d.says) for d in diagnoses(report)]


@pytest.mark.parametrize("name", ["paper", "streaming4", "naive8", "nsep+out3", "everything"])
def test_attention_from_the_text_alone_conforms(name: str) -> None:
    """A1 A2 A3."""
    report = report_on(RIGHT, SCHEMES[name], ("attend",))
    assert report.conforms, [(d.rule, d.says) for d in diagnoses(report)]


def test_a_buffer_that_is_returned_again_is_no_mistake() -> None:
    """D1. An answer is copied at once; the next call may overwrite it."""
    assert report_on(Knobs(state="buffer"), SCHEMES["paper"], ("decode",)).conforms


@pytest.mark.parametrize("search", ["one for all", "later of equals"])
def test_a_port_may_search_otherwise(search: str) -> None:
    """S4. The choice belongs to the encoder, and what follows is judged on it."""
    assert report_on(Knobs(search=search), SCHEMES["search"], ("encode",)).conforms


# --- wrong ports --------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """One wrong decision, where it shows, and the rule that it breaks."""

    scheme: str
    operations: tuple[str, ...]
    knobs: tuple[tuple[str, Any], ...]
    rules: str  # several where more than one is right


def mutant(rules: str, scheme: str, operations: str, knobs: dict[str, Any]) -> Mutant:
    return Mutant(scheme, tuple(operations.split()), tuple(knobs.items()), rules)


def encoding(rules: str, scheme: str = "paper", **knobs: Any) -> Mutant:
    return mutant(rules, scheme, "encode", knobs)


def decoding(rules: str, scheme: str = "paper", **knobs: Any) -> Mutant:
    return mutant(rules, scheme, "decode", knobs)


def coding(rules: str, scheme: str = "paper", **knobs: Any) -> Mutant:
    return mutant(rules, scheme, "encode decode", knobs)


def caching(rules: str, scheme: str = "cache", **knobs: Any) -> Mutant:
    return mutant(rules, scheme, "stream", knobs)


def attending(rules: str, scheme: str = "paper", **knobs: Any) -> Mutant:
    return mutant(rules, scheme, "attend", knobs)


MUTANTS = [
    # Input
    encoding("I1", compute="input"),
    encoding("I2", nan=True),
    encoding("I2", "naive4", infinity=True),
    encoding("K1", "blocks", sinks_float32=True),
    encoding("K1", "blocks", sinks_in_scale=True),
    encoding("K1", "blocks", sinks_coded=True),
    # Norm
    encoding("N1", norm="one by one"),
    encoding("N1", norm="last to first"),
    encoding("N1", "nsep4", norm="fused"),
    encoding("N1", norm="tree"),
    encoding("N1", norm="np.sum"),
    encoding("N1", "nsep8", norm="np.linalg"),
    encoding("N1", norm="4 lanes"),
    encoding("N1", "wide", norm="32 lanes"),
    encoding("N1", norm="float16"),
    encoding("N1", norm="float64"),
    encoding("N1", "wide", norm="float64"),
    encoding("N1", "lsq", norm="float64"),
    encoding("N1", norm="order 1"),
    encoding("N1", norm="order -1"),
    encoding("N1", norm="order inf"),
    encoding("N1", norm="square"),
    encoding("N1", norm="mean"),
    encoding("N1", "gain", norm="one by one"),
    encoding("N1", "streaming4", norm="one by one"),
    encoding("N1", norm="first 64"),
    # Direction
    encoding("N2", direction="reciprocal"),
    encoding("N2", "streaming4", direction="reciprocal"),
    encoding("N2", direction="narrowed"),
    encoding("N2", direction="float64"),
    encoding("N2", direction="float16"),
    encoding("N2", epsilon=1e-12),
    encoding("N2", epsilon=1e-8),
    encoding("N2", epsilon=1e-6),
    encoding("N2", epsilon=1e-5),
    encoding("N2", least_norm=1e-12),
    encoding("N2", least_norm=1e-6),
    encoding("N2", square_epsilon=1e-6),
    encoding("N2", "asymmetric", zero_token_coded=True),
    encoding("N2", "asymmetric", zero_token_skipped=True),
    encoding("N1 N2 M1", least_valid_norm=2.0**-20),
    # Balanced norms
    encoding("N3", "balanced", choice="never"),
    encoding("N3", "balanced", choice="always"),
    encoding("N3", "balanced blocks", choice="or equal"),
    encoding("N3", "balanced", peak="mean square"),
    encoding("N3", "balanced blocks", peak="signed"),
    encoding("N3", "balanced", least_size=0.0),
    encoding("N3", "balanced blocks", size_of="sequence"),
    encoding("N3", "balanced", over_size="reciprocal"),
    encoding("N3", "balanced", growth="plain"),
    encoding("N3", "balanced", zero_tokens_out=True),
    encoding("N3", "balanced", sized_direction=True),
    encoding("M2", "balanced", sized_gain=False),
    encoding("N3", "balanced blocks", balanced_overflow="refuse"),
    # Outlier channels
    encoding("O1", "nsep+out4", rank="mean"),
    encoding("O1", "outlier4", rank="square"),
    encoding("O1", "outlier4", rank="value"),
    encoding("O1", "nsep+out4", equals="higher"),
    encoding("O1", "nsep+out4", outlier_order="size"),
    encoding("O1", "nsep+out4", outliers_in_scale=True),
    encoding("O1", "nsep+out4", outlier_codes=True),
    encoding("O1 N1", "nsep+out4", outlier_norm="coded"),
    encoding("O1", "nsep+out4", outlier_values="x"),
    encoding("O1", "outliers by channel", outlier_scales=True),
    # Scales
    encoding("S1", levels=1),
    encoding("S1", levels=0.5),
    encoding("S1", extent="wrong axis"),
    encoding("S1", "naive4", extent="all"),
    encoding("S1", extent="signed"),
    encoding("S1", extent="last token out"),
    encoding("S1", "pchan4", range_from="half range"),
    encoding("S1", scale="reciprocal"),
    encoding("S1", scale_shape="per token"),
    encoding("S1", scale_shape="one"),
    encoding("S1 S3", least_scale=1e-5),
    encoding("S1 S3", empty_scale=1.0),
    encoding("S2", "asymmetric", levels=1),
    encoding("S2", "asymmetric", range_from="minimum"),
    encoding("S2", "asymmetric", negative_scale="zero"),
    encoding("S2", "asymmetric vectors", negative_scale="magnitude"),
    encoding("S2", "asymmetric", extent="with zero"),
    encoding("S3", narrow_after_codes=True),
    encoding("S3", "naive4", narrow_after_codes=True),
    encoding("S3", "nsep+out4", narrow_after_codes=True),
    encoding("S3", "asymmetric", zero_after_codes=True),
    encoding("S2 S3", "wide asymmetric", scale="float64"),
    encoding("S3", scale="narrowed maximum"),
    encoding("S3", scale_narrowing="truncate"),
    encoding("S3", scale_narrowing="away"),
    encoding("S3", scale_narrowing="flush"),
    encoding("S5", "naive4", scale_overflow="store", decode_check=False),
    encoding("S5", "naive4", scale_overflow="saturate"),
    encoding("Z1", "asymmetric", negative_zero=True),
    # Codes
    encoding("Q1", rounding="half away"),
    encoding("Q1", "naive4", rounding="half away"),
    encoding("Q1", "streaming4", rounding="half away"),
    encoding("Q1", rounding="half up"),
    encoding("Q1", rounding="half down"),
    encoding("Q1", rounding="half to zero"),
    encoding("Q1", rounding="half odd"),
    encoding("Q1", rounding="truncate"),
    encoding("Q1", rounding="floor"),
    encoding("Q1", rounding="plus half"),
    encoding("Q1", "naive4", rounding="almost half"),
    encoding("Q1", "asymmetric", rounding="plus half, floor"),
    encoding("Q1", quotient="reciprocal"),
    encoding("Q1", "naive8", quotient="reciprocal"),
    encoding("Q1", "wide", quotient="float64"),  # a tie is exact with shorter scales
    encoding("Q1", "nsep4", quotient="merged"),
    encoding("Q1", "asymmetric", quotient="apart"),
    encoding("Q1", "asymmetric", quotient="float64 throughout"),
    encoding("Q1", scale_epsilon=1e-8),
    encoding("Q1", scale_epsilon=1e-6),
    encoding("Q1", "asymmetric", cast_first=True),
    encoding("Q2", most_negative=True),
    encoding("Q2", "pchan3", most_negative=True),
    # Bytes
    encoding("P1", nibbles="high-first"),
    encoding("P1", "naive2", nibbles="high-first"),
    encoding("P1", nibbles="halves"),
    encoding("P1", offset="one less"),
    encoding("P1", offset="two's complement"),
    encoding("P1", offset="sign"),
    encoding("P1", padding="zero bits"),
    encoding("P1", "pchan3", padding="zero bits"),
    encoding("P1", rows="shared"),
    encoding("P1", last_byte="dropped"),
    encoding("P1", "naive3", planes="high, low"),
    encoding("P1", "naive3", planes="contiguous"),
    decoding("P1", nibbles="high-first"),
    decoding("P1", "naive3", planes="high, low"),
    decoding("P1", offset="two's complement"),
    # Factors
    encoding("M1", stored_norm="float64"),
    encoding("M1", factor_narrowing="truncate"),
    encoding("M1", factor_narrowing="away"),
    encoding("M1", factor_narrowing="flush"),
    encoding("M2", "gain", factor_narrowing="truncate"),
    encoding("M3", "lsq", factor_narrowing="away"),
    encoding("M1", scale_narrowing="truncate", factor_narrowing="truncate"),
    encoding("M1", scale_narrowing="away", factor_narrowing="away"),
    encoding("M1", scale_narrowing="flush", factor_narrowing="flush"),
    encoding("S3", "lsq", scale_narrowing="truncate", factor_narrowing="truncate"),
    encoding("M4", factor_overflow="store", decode_check=False),
    encoding("M4", factor_overflow="saturate"),
    encoding("M4", most_norm=65504.0),
    encoding("M4", "gain", factor_overflow="saturate"),
    encoding("D2", "pchan4", collapsed="refused"),
    encoding("D3", "asymmetric vectors bfloat16", decode_check=False),
    encoding("M2", "gain", gain="norm"),
    encoding("M2", "gain", gain="reciprocal"),
    encoding("M2", "gain", gain="float32 length"),
    encoding("M2", "gain", gain="float64"),
    encoding("M3", "lsq", lsq="float32"),
    encoding("M3", "streaming4", lsq="float32"),
    encoding("M3", "lsq", lsq="over x"),
    encoding("M3", "lsq", lsq="float64"),
    encoding("M3", "wide lsq", lsq="float64 rounded"),
    encoding("M3", "wide lsq", lsq="float64"),
    encoding("M3", "lsq", lsq="norm"),
    encoding("M3", "streaming4", lsq="gain"),
    encoding("M3", "lsq", lsq="direction"),
    encoding("M3", "lsq", lsq="norm times direction"),
    # Parts
    encoding("M4", dtype_of="norm"),
    encoding("S3", dtype_of="scale"),
    encoding("P1", dtype_of="packed"),
    encoding("O1", "outlier4", dtype_of="outlier_index"),
    encoding("M1", missing="norm"),
    encoding("S2", "asymmetric", missing="zero"),
    encoding("K1", "blocks", missing="sinks"),
    encoding("S2", extra="zero"),
    # Blocks
    encoding("B1", "blocks", block=1),
    encoding("B1", "blocks", block=-1),
    encoding("B1 K1", "blocks", blocks_from="first token"),
    encoding("B1", "blocks", blocks="one"),
    encoding("B2", heads="shared"),
    # Decoding
    decoding("D1", decode="merged"),
    decoding("D1", decode="product first"),
    decoding("D1", decode="reciprocal"),
    decoding("D1", decode="float64"),
    decoding("D1", decode="not renormalised"),
    decoding("D1", decode="by the stored norm"),
    decoding("D1", decode="unit"),
    decoding("D1", length="one by one"),
    decoding("D1", length="np.sum"),
    decoding("D1", length_epsilon=1e-8),
    decoding("D1", length_epsilon=1e-6),
    decoding("D1", "wide asymmetric", product="fused"),
    decoding("D1", "wide asymmetric", product="middle"),
    decoding("D1", "asymmetric", zero_left_out=True),
    decoding("D1", "wide", decode_flush=True),
    decoding("D1", "gain", renormalize_gain=True),
    decoding("K1", "blocks", sinks_forgotten=True),
    decoding("O1 D1", "nsep+out4", outliers_late=True),
    decoding("O1 D1", "outlier4", outliers_forgotten=True),
    decoding("B1", "blocks", decode_block=1),
    decoding("B1", "blocks", blocks_from="first token"),
    # Caches
    caching("B1", tail="quantized"),
    caching("B1", tail="float32"),
    caching("B1", tail="float16"),
    caching("B1", seal_late=True),
    caching("B1", block=1),
    caching("B1", "plain cache", growing=True),
    caching("C1", old_scales=True),
    caching("C1", cropped="raw"),
    caching("C1", cropped="truncated"),
    caching("C1", "everything", cropped="overflow"),
    caching("C1", cropped="dropped"),
    caching("K1", sinks_float32=True),
    caching("K1", sinks_in_scale=True),
    caching("K1", sinks_refilled=False),
    caching("K1 C1", sinks_kept=True),
    caching("B2", stream_rows="shared"),
    # Attention
    attending("A1", score_scale="none"),
    attending("A1", score_scale="1 / D"),
    attending("A1", score_scale="1 / sqrt(D)"),
    attending("A1", softcap="none"),
    attending("A1", softcap="after the mask"),
    attending("A1", head_order="in turn"),
    attending("A1", subtract=False),
    attending("A1 D1", value_scheme="of the keys"),
    attending("A2", causal="one more"),
    attending("A2", causal="one less"),
    attending("A2", causal="ignored"),
    attending("A2", position="first"),
    attending("A2", window=1),
    attending("A2", window=-1),
    attending("A2", window_left_out=True),
    # Between calls
    encoding("B2", state="largest scale"),
    encoding("B2 S1", state="scales by shape"),
    encoding("B2", state="bytes not cleared"),
]

# Mistakes of which the kit's table knows nothing: the stage that is wrong is named all the same.
UNKNOWN = [
    encoding("S1", scale_factor=1.01),
    encoding("S1", extent="quantile"),
    encoding("S1", extent="pairs"),
    encoding("N1", norm="rounded down"),
    encoding("N1", norm="logarithm"),
    encoding("N1", norm="even channels"),
    encoding("N1", "nsep+out4", norm="even channels"),
    encoding("N1", "nsep4", norm="last one out"),
    encoding("N1", norm="hypot"),
    encoding("Q1", code_noise=True),
    encoding("Q1", "naive4", rounding="ceil"),
    encoding("Q1", "naive8", rounding="tenths first"),
    encoding("Q1", quotient="float16"),
    encoding("Q1", "everything", quotient="float16"),
    encoding("P1", offset="negated"),
    encoding("P1", padding="last code"),
    encoding("P1", "naive3", planes="high bits of a byte first"),
    encoding("M1 N1", stored_norm="gain"),
    encoding("M2", "gain", gain="inverse"),
    encoding("M2", "gain", gain="mean ratio"),
    encoding("N3", "balanced", peak="median"),
    encoding("O1", "nsep+out4", rank="median"),
    decoding("D1", decode="float16"),
    decoding("D1", decode="renormalised twice"),
    decoding("D1", length="hypot"),
]

# Two mistakes at once: both are named, in whichever order.
PAIRS = [
    encoding("P1 Q1", nibbles="high-first", rounding="half away"),
    encoding("N1 Q1", norm="one by one", quotient="reciprocal"),
    encoding("S1 Q1", levels=1, rounding="truncate"),
    encoding("N2 S3", direction="reciprocal", scale="narrowed maximum"),
    encoding("S3 M1", narrow_after_codes=True, factor_narrowing="truncate"),
    encoding("S2 P1", "asymmetric", range_from="minimum", nibbles="high-first"),
    encoding("Q1 M3", "lsq", rounding="half up", lsq="float32"),
    encoding("O1 Q1", "nsep+out4", rank="mean", rounding="half away"),
    coding("P1 D1", nibbles="high-first", decode="merged"),
    coding("N1 D1", norm="np.sum", length="np.sum"),
]


def named(mutant: Mutant) -> str:
    knobs = ", ".join(f"{name}={value}" for name, value in mutant.knobs)
    return f"{' '.join(mutant.operations)} {mutant.scheme}: {knobs}"


@functools.cache
def report_of(mutant: Mutant) -> Report:
    scheme, knobs = SCHEMES[mutant.scheme], dict(mutant.knobs)
    # Of other dtypes, only what is kept as it came tells more, or what is computed in them.
    dtypes = CASE_DTYPES if scheme.sink_tokens or "compute" in knobs else ("float32",)
    return report_on(Knobs(**knobs), scheme, mutant.operations, dtypes)


@pytest.mark.parametrize("mutant", [*MUTANTS, *UNKNOWN], ids=named)
def test_the_rule_that_a_port_breaks_is_named_first(mutant: Mutant) -> None:
    """A1 A2 B1 B2 C1 D1 D2 D3 I1 I2 K1 M1 M2 M3 M4 N1 N2 N3 O1 P1 Q1 Q2 S1 S2 S3 S5 Z1."""
    report = report_of(mutant)
    assert not report.conforms
    found = diagnoses(report)
    assert found[0].rule in mutant.rules.split(), [(d.rule, d.mistake, d.says) for d in found]


@pytest.mark.parametrize("mutant", UNKNOWN, ids=named)
def test_what_is_not_known_is_not_taken_for_something_known(mutant: Mutant) -> None:
    """B1 D1 M1 M2 N1 N3 O1 P1 Q1 S1."""
    assert diagnoses(report_of(mutant))[0].mistake == ""


@pytest.mark.parametrize("mutant", PAIRS, ids=named)
def test_two_mistakes_are_both_named(mutant: Mutant) -> None:
    """D1 M1 M3 N1 N2 O1 P1 Q1 S1 S2 S3."""
    found = [d.rule for d in diagnoses(report_of(mutant))]
    assert found[0] in mutant.rules.split()
    assert set(mutant.rules.split()) <= set(found)


def test_a_port_that_writes_to_its_input_is_told_so() -> None:
    """I1. The array is the caller's."""
    report = report_on(Knobs(writes=True), SCHEMES["paper"], ("encode",))
    assert not report.conforms
    assert {failure.kind for _, failure in report.schemes[0].failures} == {"out of bounds"}


# --- arguments ----------------------------------------------------------------------------------


def test_seeds_of_any_integer_type() -> None:
    """Whatever counts as an integer, and the report is ready for JSON."""
    for seed in (3, np.int64(3), np.uint8(3), np.array(3)):
        report = check(nsq.quantize, scheme="naive2", seed=seed, dtypes=["float32"])  # type: ignore[arg-type]
        assert report.conforms
        assert json.loads(json.dumps(as_json(report)))["seed"] == 3


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"seed": 1.0}, TypeError, "seed=1.0 is not an integer"),
        ({"seed": "7"}, TypeError, "seed='7' is not an integer"),
        ({"seed": -1}, ValueError, "seed=-1 must be an integer of at least 0"),
        ({"seed": True}, TypeError, "seed=True is not an integer"),
        ({"latitudes": "norm-ulp=1"}, TypeError, "latitudes must be a sequence of names"),
        ({"latitudes": [1]}, TypeError, "latitudes must be a sequence of names"),
        ({"dtypes": "float32"}, TypeError, "dtypes must be a sequence of names"),
        ({"dtypes": [np.float32]}, TypeError, "dtypes must be a sequence of names"),
        ({"dtypes": []}, ValueError, "are not some of float32"),
        ({"scheme": "KIVI-K2V4"}, ValueError, "is a pair for keys and values"),
        ({"scheme": Scheme.named("KIVI-K2V4")}, TypeError, "scheme is a pair for keys and values"),
        ({"scheme": 4}, TypeError, "scheme must be a Scheme or a name such"),
        ({"scheme": Scheme(block_size=2**40)}, ValueError, "block_size=1099511627776 is more"),
    ],
)
def test_wrong_arguments_are_named(options: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        check(nsq.quantize, **options)
