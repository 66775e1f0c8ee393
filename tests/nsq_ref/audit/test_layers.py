"""What is taken, by which names, and how the rest is refused: by array, layer, index and remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nsq_ref.audit import as_layers, audit, layers_of_arrays
from nsq_ref.dtypes import Array

ONE = np.ones((1, 2, 6, 4), np.float32)


def bad(value: float, dtype: str = "float32") -> Array:
    x = np.ones((3, 1, 2, 6, 4), dtype)
    x[2, 0, 1, 5, 3] = value
    return x


def test_an_array_of_all_layers_or_one_for_each() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 2, 6, 4)).astype(np.float32)
    for given in (x, list(x), tuple(x.astype(np.float64))):
        layers = as_layers(given, given, given)
        assert [layer.number for layer in layers] == [0, 1, 2]
        for layer, own in zip(layers, x, strict=True):
            for array in layer[1:4]:
                np.testing.assert_array_equal(array, own)
    without_batch = as_layers(x[:, 0], [one[0] for one in x])
    np.testing.assert_array_equal(without_batch[1].keys, x[1, :1])
    assert as_layers([x[0], x[1][:, :, :3]], [x[0], x[1][:, :, :3]])[1].keys.shape == (2, 2, 3, 4)


@pytest.mark.parametrize(
    "names",
    [
        ("layers.{}.keys", "layers.{}.values", "layers.{}.queries"),
        ("past_key_values.{}.key", "past_key_values.{}.value", "past_key_values.{}.query"),
        ("model.layer{}.attn/k", "model.layer{}.attn/v", "model.layer{}.attn/q"),
        ("k{}", "v{}", "q{}"),
    ],
)
def test_names_of_layers_are_numbers(names: tuple[str, str, str]) -> None:
    arrays = {
        name.format(layer): np.full_like(ONE, layer) for layer in (10, 2, 33) for name in names
    }
    layers = layers_of_arrays(arrays)
    assert [layer.number for layer in layers] == [2, 10, 33]
    for layer in layers:
        assert {float(array.mean()) for array in layer[1:4]} == {layer.number}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"keys": ONE}, "there are no values among 'keys'; add an array named values"),
    ({"values": ONE}, "there are no keys among 'values'; add an array named keys"),
    ({"keys": ONE, "values": ONE, "weights": ONE}, "array 'weights' is not named as keys, values"),
    ({"key_value": ONE}, "array 'key_value' is not named"),
    ({"k": ONE, "key": ONE, "v": ONE}, "arrays \"array 'k'\" and 'key' are both keys of all"),
    ({"l.1.k": ONE, "k": ONE, "v": ONE}, "has no number of a layer and array 'l.1.k' has"),
    ({"k0": ONE, "v0": ONE, "k1": ONE}, "there are keys of layer 1, but no values"),
    ({"k0": ONE, "v0": ONE, "v3": ONE}, "there are values of layer 3, but no keys"),
    ({"k0": ONE, "v0": ONE, "q1": ONE}, "there are keys of layer 0, but no queries"),
    ({"k0": ONE, "v0": ONE[:, :, :5]}, "layer 0: array 'k0' is .* = [1, 2, 6, 4] and array 'v0'"),
    ({"k7": ONE, "v7": ONE, "q7": ONE[:, :1]}, "layer 7: array 'q7' is .* their heads a multiple"),
    ({"k7": ONE, "v7": ONE, "q7": ONE[..., :2]}, "layer 7: array 'q7'"),
    ({"k": ONE[0, 0], "v": ONE}, "array 'k' has shape [6, 4]; give [layers, batch"),
    ({"k4": ONE[0, 0], "v4": ONE}, "array 'k4' has shape [6, 4]; a layer is [batch"),
    ({"k4": ONE[:, :, :0], "v4": ONE}, "array 'k4' has shape [1, 2, 0, 4] and holds nothing of"),
    ({"k": ONE[None][:0], "v": ONE[None][:0]}, "keys and values have no layers"),
    ({"k": bad(np.nan), "v": bad(1)}, "array 'k'[2, 0, 1, 5, 3] is nan (layer 2); leave padding"),
    ({"k": bad(1), "v": bad(-np.inf)}, "array 'v'[2, 0, 1, 5, 3] is -inf (layer 2); leave padd"),
    ({"k": bad(1), "v": bad(np.inf, "float16")}, "(layer 2); float16 holds at most 65504"),
    ({"k": bad(1e300, "float64"), "v": bad(1)}, "is 1e+300 (layer 2); that is beyond float32"),
    ({"k5": bad(np.nan)[2], "v5": ONE}, "array 'k5'[0, 1, 5, 3] is nan (layer 5)"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "message"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_refused(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the whole text is compared below
        layers_of_arrays(arrays)
    said = str(raised.value).replace('"', "'")
    for part in message.replace('"', "'").split(" .* "):
        assert part.replace("''", "'") in said.replace("''", "'")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"keys": "abc"}, TypeError, "keys has dtype"),
        ({"keys": np.ones((1, 2, 6, 4), np.int32)}, TypeError, "keys has dtype int32"),
        ({"keys": [ONE, ONE]}, ValueError, "there are keys of layer 1, but no values"),
        (
            {"queries": np.full((1, 1, 2, 6, 4), np.nan)},
            ValueError,
            r"queries\[0, 0, 0, 0, 0\] is nan",
        ),
        ({"schemes": ["naive5"]}, ValueError, "naive5"),
        ({"schemes": ["outlier4"]}, ValueError, "outlier4 has outlier channels"),
        ({"default": "naive4"}, ValueError, "default of keys has no block size"),
        ({"limit": 1.5}, ValueError, "limit=1.5 must be between 0 and 1"),
        ({"limit": "x"}, TypeError, "limit='x' is not a number"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale=0.0 must be more than 0"),
    ],
)
def test_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        audit(**{"keys": ONE[None], "values": ONE[None], **given})


def test_float32_that_cannot_be_stored_names_the_layer() -> None:
    x = np.full((2, 1, 1, 3, 4), 3e38, np.float32)
    with pytest.raises(ValueError, match="keys of layer 0: "):
        audit(x, x)
