"""Methods: names, pairs, policies, and what they do layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nsq_ref import Feedback, KeyValueSchemes, Scheme, dequantize, quantize
from nsq_ref.rivals import entry
from onnx_export.evaluation.methods import Method, methods_of

KEYS, VALUES = np.random.default_rng(0).standard_normal((2, 4, 1, 2, 70, 64)).astype(np.float32)


def test_layers_get_what_the_policy_says() -> None:
    policy = {
        "default": "naive4",
        "layers": {
            "0": None,
            "2": {"key": "pchan4", "value": None},
            3: {"key": Scheme(bits=8).to_dict(), "value": "q8_0"},
        },
    }
    (keys, values), size = Method.of(policy).bound(4).replaced(KEYS, VALUES)
    expected = [
        (None, None), ("naive4", "naive4"), ("pchan4", None), ("nsep+pchan8", "q8_0"),
    ]  # fmt: skip
    bits = kept = coded = 0
    for layer, names in enumerate(expected):
        for found, given, side, name in zip(
            (keys, values), (KEYS, VALUES), ("key", "value"), names, strict=True
        ):
            if name is None:
                np.testing.assert_array_equal(found[layer], given[layer])
                kept += given[layer].size
                continue
            stored = getattr(entry(name), side)(given[layer])
            np.testing.assert_array_equal(found[layer], stored.x_hat)
            bits, coded = bits + stored.sealed_bits, coded + stored.sealed_elements
    assert size == (bits, coded, kept)
    assert size.to_dict()["bits_per_element"] == (bits + 16 * kept) / (coded + kept)


@pytest.mark.parametrize(
    ("spec", "key", "value"),
    [
        ("streaming4", "streaming4", "streaming4"),
        ("streaming4/q8_0", "streaming4", "q8_0"),
        (KeyValueSchemes(Scheme.named("naive4"), Scheme.named("naive8")), "naive4", "naive8"),
        (entry("kivi2"), "kivi2", "kivi2"),
        ({"key": "naive4", "value": "kivi2"}, "naive4", "kivi2"),
        ("KIVI-K2V4", "pchan2", "pchan4"),
    ],
)
def test_what_stands_for_a_method(spec: Any, key: str, value: str) -> None:
    assert Method.of(spec).policy.default == (entry(key).key, entry(value).value)


def test_what_is_left_alone_and_what_is_rounded() -> None:
    same, size = Method.of("float32").bound(4).replaced(KEYS, VALUES)
    np.testing.assert_array_equal(same[0], KEYS)
    half, _ = Method.of("float16").bound(4).replaced(KEYS, VALUES)
    np.testing.assert_array_equal(half[1], VALUES.astype(np.float16))
    assert size.to_dict() == {"bits_per_element": 16.0, "sealed_bits_per_element": 0.0}


def test_static_scales_are_of_other_text() -> None:
    method = Method.of({"default": "onnxruntime-int4", "layers": {"1": "naive4"}})
    with pytest.raises(ValueError, match="has static scales; give calibration"):
        method.bound(4)
    other = (3 * KEYS, 5 * VALUES)
    (keys, values), _ = method.bound(4, other).replaced(KEYS, VALUES)
    for layer in (0, 2, 3):
        calibrated = entry("onnxruntime-int4").calibrated(other[0][layer], other[1][layer])
        np.testing.assert_array_equal(keys[layer], calibrated.key(KEYS[layer]).x_hat)
        np.testing.assert_array_equal(values[layer], calibrated.value(VALUES[layer]).x_hat)


def test_scales_are_part_of_what_a_method_is() -> None:
    static = entry("onnxruntime-int4")
    shown = [Method.of(one).to_dict() for one in (
        static, static.calibrated(KEYS, VALUES), static.calibrated(KEYS, 2 * VALUES),
    )]  # fmt: skip
    assert shown[0] != shown[1] != shown[2]
    assert shown[1]["key"] == shown[2]["key"]
    assert Method.of(static.calibrated(KEYS, VALUES)).to_dict() == shown[1]


WRONG = {
    "no such name": ("nsep+pcan4", ValueError, "unknown scheme name 'nsep\\+pcan4'"),
    "no such value": ("naive4/nsep", ValueError, "unknown scheme name 'nsep'"),
    "a layer's name": (
        {"layers": {"1": "x"}},
        ValueError,
        "policy: layer 1: unknown scheme name 'x'",
    ),
    "no layer": ({"layers": {"first": None}}, ValueError, "'first' is no number of a layer"),
    "a layer twice": ({"layers": {"1": None, 1: None}}, ValueError, "layer 1 is named twice"),
    "only keys": ({"layers": {"1": {"key": "naive4"}}}, ValueError, "layer 1: has key; give key"),
    "no scheme": (
        {"key": 4, "value": 4},
        TypeError,
        "must be null, a name, or key and value, got 4",
    ),
    "a list": ({"layers": ["naive4"]}, TypeError, "layers must be a mapping"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_method_is_told(name: str) -> None:
    spec, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        Method.of(spec)


def test_lists_of_methods() -> None:
    with pytest.raises(ValueError, match="at least one"):
        methods_of([])
    with pytest.raises(ValueError, match="'naive4' is named twice"):
        methods_of(["naive4", "naive8", "naive4"])
    with pytest.raises(ValueError, match="there is no layer 4; the model has layers 0 to 3"):
        Method.of({"layers": {"4": None}}).bound(4)
    assert [one.name for one in methods_of({"a": "naive4", "b": "naive4"})] == ["a", "b"]
    assert [one.name for one in methods_of("naive4")] == ["naive4"]


def test_a_profile_that_is_made_for_feedback_is_not_measured_without() -> None:
    queries = np.random.default_rng(2).standard_normal((4, 2, 90, 64))
    feedback = {str(i): Feedback.from_queries(one, kv_heads=2) for i, one in enumerate(queries)}
    fed_back = Method.of("best-3").with_feedback(feedback)
    assert (fed_back.name, fed_back.wants_feedback) == ("best-3", False)
    (keys, _), _ = fed_back.bound(4).replaced(KEYS, VALUES)
    key = Scheme.named("best-3").key
    expected = [
        dequantize(quantize(one, key, feedback=feedback[str(i)])) for i, one in enumerate(KEYS)
    ]
    np.testing.assert_array_equal(keys, expected)
    wanting: list[Any] = ["best-3", "best-3/q4_0", {"default": "q4_0", "layers": {"1": "best-3"}}]
    for spec in wanting:
        method = Method.of(spec)
        assert method.wants_feedback
        with pytest.raises(ValueError, match=r"best-3 is made for feedback"):
            method.require_feedback()
        with pytest.raises(ValueError, match=r"layer [01]: best-3 is made for feedback"):
            method.bound(4)
    del feedback["3"]
    with pytest.raises(ValueError, match=r"layer 3: best-3 is made for feedback"):
        Method.of("best-3").with_feedback(feedback).bound(4)
    others: list[Any] = ["q4_0/best-3", Scheme.named("best-3"), "small-3"]
    for method in map(Method.of, others):
        assert not method.wants_feedback
        method.require_feedback()
        method.bound(4)
    with pytest.raises(ValueError, match=r"best-3 is made for feedback"):
        entry("best-3").store(KEYS[0], VALUES[0])
    with pytest.raises(ValueError, match="q4_0 codes keys by no scheme of NSQ-1"):
        entry("q4_0").with_feedback(feedback["0"])


def test_feedback_is_of_the_keys_that_a_scheme_codes() -> None:
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((4, 2, 90, 64)) @ rng.standard_normal((64, 64))
    feedback = {str(i): Feedback.from_queries(one, kv_heads=2) for i, one in enumerate(queries)}
    policy = {"default": "streaming2", "layers": {"0": None, "2": "q8_0/naive4"}}
    plain = Method.of(policy, "mixed")
    method = plain.with_feedback(feedback)
    assert (method.name, plain.takes_feedback) == ("mixed+feedback", True)
    (keys, values), size = method.bound(4).replaced(KEYS, VALUES)
    (plain_keys, plain_values), plain_size = plain.bound(4).replaced(KEYS, VALUES)
    assert size == plain_size
    np.testing.assert_array_equal(values, plain_values)
    for layer in (0, 2):
        np.testing.assert_array_equal(keys[layer], plain_keys[layer])
    scheme = Scheme.named("streaming2")
    for layer in (1, 3):
        stored = quantize(KEYS[layer], scheme, feedback=feedback[str(layer)])
        np.testing.assert_array_equal(keys[layer], dequantize(stored))
        assert (keys[layer] != plain_keys[layer]).any()
    shown = method.to_dict()["layers"]
    assert shown["1"]["key"]["feedback"] == feedback["1"].digest
    assert "feedback" not in shown["2"]["key"] | shown["1"]["value"] | plain.to_dict()["key"]


def test_feedback_that_does_not_fit() -> None:
    feedback = Feedback.from_queries(np.eye(64)[None], kv_heads=1)
    for name in ("q4_0", "float32/streaming4"):
        assert not Method.of(name).takes_feedback
        with pytest.raises(ValueError, match="codes keys by no scheme of NSQ-1"):
            Method.of(name).with_feedback({"0": feedback})
    with pytest.raises(ValueError, match="'last' is no number of a layer"):
        Method.of("naive4").with_feedback({"last": feedback})
    with pytest.raises(ValueError, match="there is no layer 9"):
        Method.of("naive4").with_feedback({"9": feedback}).bound(4)
    other = Feedback.from_queries(np.eye(32)[None], kv_heads=1)
    with pytest.raises(ValueError, match="feedback"):
        Method.of("naive4").with_feedback({"1": other}).bound(4).replaced(KEYS, VALUES)
