"""What each name means, field by field: a name that changes its meaning is seen here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nsq_ref
from nsq_ref import Feedback, KeyValueSchemes, KVCache, Quantized, quantize, spec
from nsq_ref.profiles import profile_names, wants_feedback
from nsq_ref.scheme import PARTS, Scheme, scheme_names

DEFAULTS: dict[str, Any] = {
    "bits": 4, "separate_norm": True, "axis": "channel", "symmetric": True,
    "scale_rule": "range", "norm_rule": "plain", "magnitude": "norm", "block_size": None,
    "sink_tokens": 0, "outlier_channels": 0, "scale_dtype": "float16", "norm_dtype": "float16",
}  # fmt: skip
# What differs from the defaults, by family; widths are in the names.
FAMILIES: dict[str, dict[str, Any]] = {
    "naive": {"separate_norm": False, "axis": "token"},
    "nsep": {"axis": "token"},
    "pchan": {"separate_norm": False},
    "outlier": {"separate_norm": False, "axis": "token", "outlier_channels": 4},
    "nsep+out": {"axis": "token", "outlier_channels": 4},
    "nsep+pchan": {},
    "streaming": {"symmetric": False, "magnitude": "lsq", "block_size": 128, "sink_tokens": 1},
}
EXPECTED: dict[str, dict[str, Any]] = {
    f"{family}{bits}": {"bits": bits, **own}
    for family, own in FAMILIES.items()
    for bits in (2, 3, 4, 8)
}
EXPECTED["streaming2"]["scale_rule"] = "search"
EXPECTED_PAIRS = {
    "KIVI-K2V4": ("pchan2", "pchan4"),
    "KIVI-K3V8": ("pchan3", "pchan8"),
    "nsep+KIVI": ("nsep+pchan2", "nsep+pchan4"),
    "nsep+KIVI-K4V2": ("nsep+pchan4", "nsep+pchan2"),
}


PROFILE = {
    "symmetric": False, "magnitude": "gain", "block_size": 128, "sink_tokens": 1,
}  # fmt: skip
# Bits, scale rule and norm rule of keys, and of values.
EXPECTED_PROFILES = {
    "fast-4.5": (4, "range", "plain", 4, "range", "plain"),
    "small-4.5": (4, "range", "balanced", 4, "search", "plain"),
    "small-3.5": (3, "range", "balanced", 3, "search", "plain"),
    "small-3": (3, "range", "balanced", 2, "search", "plain"),
    "small-2.5": (2, "search", "balanced", 2, "search", "plain"),
    "best-4.5": (4, "search", "balanced", 4, "search", "plain"),
    "best-3.5": (3, "search", "balanced", 3, "search", "plain"),
    "best-3": (3, "search", "balanced", 2, "search", "plain"),
    "best-2.5": (2, "search", "balanced", 2, "search", "plain"),
}


def test_the_defaults_are_the_paper_s_scheme() -> None:
    assert Scheme().to_dict() == DEFAULTS


def test_every_name_is_in_the_table() -> None:
    assert scheme_names() == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_name_means_these_fields_and_no_others(name: str) -> None:
    scheme = Scheme.named(name)
    assert isinstance(scheme, Scheme)
    assert scheme.to_dict() == DEFAULTS | EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED_PAIRS)
def test_a_pair_is_made_of_named_schemes(name: str) -> None:
    assert tuple(Scheme.named(name)) == tuple(map(Scheme.named, EXPECTED_PAIRS[name]))  # type: ignore[arg-type]


def test_every_profile_is_in_the_table() -> None:
    assert profile_names() == list(EXPECTED_PROFILES)


@pytest.mark.parametrize("name", EXPECTED_PROFILES)
def test_a_profile_means_these_schemes_and_is_within_its_budget(name: str) -> None:
    pair = Scheme.named(name)
    assert isinstance(pair, KeyValueSchemes)
    expected = EXPECTED_PROFILES[name]
    for scheme, own in zip(pair, (expected[:3], expected[3:]), strict=True):
        fields = zip(("bits", "scale_rule", "norm_rule"), own, strict=True)
        assert scheme.to_dict() == DEFAULTS | PROFILE | dict(fields)
    budget = float(name.partition("-")[2])
    # Of full blocks of 64 channels exactly; the sink is float32.
    took = sum(one.bits_per_element(1 + 4096, 64) for one in pair) / 2
    assert took == pytest.approx((4096 * budget + 32) / 4097)
    assert wants_feedback(name) == name.startswith("best")


def test_the_document_has_every_profile_and_its_bits() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    found = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in EXPECTED_PROFILES}
    assert list(found) == profile_names()
    for name, (key, value, *bits, wants) in found.items():
        pair = Scheme.named(name)
        assert isinstance(pair, KeyValueSchemes)
        assert [key, value] == [f"{one.bits}, {one.scale_rule}, {one.norm_rule}" for one in pair]
        for told, channels in zip(bits, (64, 128, 256), strict=True):
            took = sum(one.bits_per_element(4096, channels) for one in pair) / 2
            assert told == f"{took:.2f}"
        assert wants_feedback(name) == wants.startswith("feedback")


def test_what_is_made_for_feedback_is_refused_by_name_without_it() -> None:
    """The names of the schemes alone tell; who gives schemes is believed."""
    x = np.random.default_rng(0).standard_normal((1, 2, 200, 8), dtype=np.float32)
    feedback = Feedback.from_queries(x, kv_heads=2)
    remedy = r"best-3 is made for feedback.*`nsq onnx calibrate MODEL .*or take small-3, which"
    with pytest.raises(ValueError, match=remedy):
        KVCache(1, 2, 8, "best-3")
    cache = KVCache(1, 2, 8, "best-3", key_feedback=feedback)
    assert (cache.key, cache.value) == Scheme.named("best-3")
    assert KVCache(1, 2, 8, "small-3").value.bits == 2
    assert KVCache(1, 2, 8, Scheme.named("best-3")).key == cache.key
    for name, beside in (("best-3", ", with feedback for the keys$"), ("small-3", r"\.value$")):
        with pytest.raises(ValueError, match=f"scheme='{name}' names a pair.*{beside}"):
            quantize(x, name)
    assert not any(map(wants_feedback, ("best", "best-3.0", "streaming4", x, None, [])))


def test_names_differ_in_more_than_their_letters() -> None:
    assert len(set(map(Scheme.named, scheme_names()))) == len(scheme_names())


@pytest.mark.parametrize(
    ("size", "sinks", "length", "cut"),
    [
        (4, 2, 0, (0, 0, 0)),
        (4, 2, 1, (1, 0, 0)),
        (4, 2, 5, (2, 0, 3)),
        (4, 2, 6, (2, 4, 0)),
        (4, 0, 11, (0, 8, 3)),
        (1, 1, 3, (1, 2, 0)),
        (None, 1, 9, (1, 0, 8)),
    ],
)
def test_cut(size: int | None, sinks: int, length: int, cut: tuple[int, int, int]) -> None:
    """K1, B1: sinks first, then full blocks; what is left waits in the tail."""
    assert Scheme(block_size=size, sink_tokens=sinks).cut(length) == cut


def test_cut_refuses() -> None:
    with pytest.raises(ValueError, match="length=-1"):
        Scheme().cut(-1)


def test_unknown_schemes() -> None:
    for name in (
        "",
        "nsep",
        "nsep5",
        "pchan44",
        "NSEP4",
        "nsep+KIVI-K2",
        "KIVI-K2V5",
        "naive4 ",
        "best-",
        "best-4",
        "fast-3",
        "small-3.0",
        "Best-3",
    ):
        with pytest.raises(ValueError, match=r"unknown scheme name .*; known are naive, nsep"):
            Scheme.named(name)
    with pytest.raises(TypeError, match=r"name must be a string such as 'nsep\+pchan4', got 4"):
        Scheme.named(4)  # type: ignore[call-overload]
    for fields, message in (
        ({"bits": 5}, r"bits=5 is not supported; choose one of 2, 3, 4, 8"),
        ({"bits": 4.0}, r"bits=4\.0 is not supported"),
        ({"symmetric": 1}, r"symmetric=1 is not supported; choose one of True, False"),
        ({"axis": "tokens"}, r"axis='tokens' is not supported; choose one of 'channel', 'token'"),
        ({"block_size": 0}, r"block_size=0 .* at least 1 or None"),
        ({"block_size": True}, r"block_size=True is not supported"),
        ({"sink_tokens": -1}, r"sink_tokens=-1 .* at least 0"),
        ({"scale_dtype": "float64"}, r"scale_dtype='float64' is not supported"),
        (
            {"separate_norm": False, "magnitude": "lsq"},
            r"magnitude='lsq' has no effect with separate",
        ),
        ({"separate_norm": False, "norm_dtype": "float32"}, r"norm_dtype='float32' has no effect"),
        ({"norm_rule": "even"}, r"norm_rule='even' is not supported; choose one of 'plain', 'bal"),
        (
            {"separate_norm": False, "norm_rule": "balanced"},
            r"norm_rule='balanced' has no effect .* leave norm_rule out or set separate_norm=True",
        ),
        (
            {"norm_rule": "balanced", "axis": "token", "magnitude": "gain"},
            r"norm_rule='balanced' .*; set axis='channel' or norm_rule='plain'",
        ),
        (
            {"norm_rule": "balanced", "magnitude": "norm"},
            r"norm_rule='balanced' .*; set magnitude='gain' or 'lsq', or norm_rule='plain'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Scheme(**fields)  # type: ignore[arg-type]


def test_names_of_the_paper() -> None:
    """Every name means what docs/spec.md says."""
    rows = {
        "naive": (False, "token", 0), "nsep": (True, "token", 0), "pchan": (False, "channel", 0),
        "outlier": (False, "token", 4), "nsep+out": (True, "token", 4),
        "nsep+pchan": (True, "channel", 0),
    }  # fmt: skip
    for (family, (norm, axis, outliers)), width in (
        (r, w) for r in rows.items() for w in (2, 3, 4, 8)
    ):
        scheme = Scheme(bits=width, separate_norm=norm, axis=axis, outlier_channels=outliers)  # type: ignore[arg-type]
        assert Scheme.named(f"{family}{width}") == scheme
    pair = Scheme.named("KIVI-K2V4")
    assert isinstance(pair, KeyValueSchemes)
    assert pair == (Scheme.named("pchan2"), Scheme.named("pchan4"))
    assert Scheme.named("nsep+KIVI") == (Scheme.named("nsep+pchan2"), Scheme.named("nsep+pchan4"))
    assert Scheme.named("streaming4") == Scheme(
        symmetric=False, magnitude="lsq", block_size=128, sink_tokens=1
    )


# --- parts --------------------------------------------------------------------------------------


def test_the_table_of_parts_is_that_of_quantized_and_of_the_spec() -> None:
    """Their names are written where their types are: nowhere are there others."""
    every = Scheme(symmetric=False, sink_tokens=1, outlier_channels=1)
    names = [field.name for field in dataclasses.fields(Quantized)]
    assert tuple(names[3:-1]) == PARTS
    assert {*every.parts(8)} == {*PARTS}
    assert {*spec.Block._fields} == {*PARTS, "codes", "collapsed"} - {"packed", "sinks"}


@pytest.mark.parametrize("block_size", [None, 1, 3, 9])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_parts_have_a_row_for_what_they_say(block_size: int | None, axis: str) -> None:
    scheme = Scheme(
        axis=axis,  # type: ignore[arg-type]
        symmetric=False,
        block_size=block_size,
        sink_tokens=2,
        outlier_channels=3,
    )
    counts = {"sinks": 2, "tokens": 7, "blocks": -(-7 // min(block_size or 7, 7))}
    quantized = quantize(np.ones((2, 9, 4), np.float16), scheme)
    for name, part in scheme.parts(4, np.float16).items():
        array = quantized.parts[name]
        assert array.shape == (2, counts[part.rows], *part.columns)
        assert array.dtype == part.dtype


def test_bfloat16_comes_from_one_place() -> None:
    folder = Path(nsq_ref.__file__).parent
    importers = [
        path.name for path in folder.rglob("*.py") if "import ml_dtypes" in path.read_text("utf-8")
    ]
    assert importers == ["dtypes.py"]
