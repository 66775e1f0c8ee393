"""Nodes and models of nsq.Attention: they refuse what `attend` refuses, and what would be lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from nsq_ref import Scheme, attention
from onnx_export.operators import attention_model, attention_node, cache_fields

SCHEME = Scheme(block_size=4)
NUMBERS = (None, -1.0, -0.0, 0.0, 1e-50, 1e-40, 0.5, 30.0, 1e39, np.nan, np.inf, -np.inf)


def node(**options: Any) -> onnx.NodeProto:
    return attention_node(SCHEME, SCHEME, **{"heads": 4, "kv_heads": 2} | options)


def attributes(made: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in made.attribute}


# --- the builders --------------------------------------------------------------------------------


def attends(**options: Any) -> bool:
    """Whether the reference takes these options."""
    one = np.ones((1, 1, 1, 1), np.float32)
    try:
        attention.attend(one, one, one, **options)
    except ValueError:
        return False
    return True


@given(
    scale=st.sampled_from(NUMBERS),
    softcap=st.sampled_from(NUMBERS),
    sliding_window=st.sampled_from([None, -(2**40), -1, 0, 1, 7]),
    causal=st.booleans(),
)
def test_options_are_refused_as_the_reference_refuses_them(**options: Any) -> None:
    """A1 A2. And what float32 cannot tell from a default, which is 0 in the operator."""
    lost = False
    for name in ("scale", "softcap"):
        with np.errstate(over="ignore"):
            narrowed = np.float32(options[name] or 0)
        lost |= options[name] is not None and (narrowed == 0 or not np.isfinite(narrowed))
    if lost or not attends(**options):
        with pytest.raises(ValueError, match=r"(scale|softcap|sliding_window)="):
            node(**options)
        return
    found = attributes(node(**options))
    for name, value in options.items():
        assert found[name] == np.float32(value or 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ["key", "value", "head_sink"], "smooth_softmax": True}, "smooth_softmax is a"),
        ({"inputs": ["key", "value", "position_ids"]}, "position_ids has no effect without"),
        ({"rotary_interleaved": True}, "rotary_interleaved has no effect without"),
        ({"inputs": ["key"]}, "one of key and value"),
        ({"inputs": ["key", "value", "sin"]}, "one of cos and sin"),
        ({"inputs": ["key", "value", "bias"]}, "bias"),
        ({"heads": 0}, "heads=0 must be an integer of at least 1"),
        ({"kv_heads": -2}, "kv_heads=-2 must be"),
        ({"heads": 3}, "heads=3 is not a multiple of kv_heads=2"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    """A1 A2. By name, when the node is made."""
    with pytest.raises(ValueError, match=message):
        node(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_dim": 0}, ValueError, "head_dim=0 must be"),
        ({"head_dim": 8.0}, TypeError, "head_dim=8.0 is not an integer"),
        ({"value_head_dim": 0}, ValueError, "value_head_dim=0 must be"),
        ({"heads": 4.0}, TypeError, "heads=4.0 is not an integer"),
        ({"dtype": "bfloat16"}, ValueError, "dtype='bfloat16' is not one of float32, float16"),
        ({"opset": 20}, ValueError, "opset=20 is too old"),
        ({"inputs": [], "value_head_dim": 5}, ValueError, "value_head_dim=5 is not head_dim=8"),
        ({"soft_cap": 3.0}, TypeError, "soft_cap"),
    ],
)
def test_models_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A1 S3. Sizes, dtypes and names, before onnx sees them."""
    with pytest.raises(error, match=message):
        attention_model(SCHEME, SCHEME, **{"heads": 4, "kv_heads": 2, "head_dim": 8} | options)


def test_a_cache_that_cannot_be_is_refused() -> None:
    """B1. Its sizes are named."""
    good: dict[str, Any] = {"kv_heads": 2, "head_dim": 8, "capacity": 0}
    assert cache_fields(SCHEME, SCHEME, **good)["key_packed"].shape == (2, 0, 4)
    for name, value in (("kv_heads", 0), ("head_dim", -8), ("capacity", -1), ("dtype", "float64")):
        with pytest.raises(ValueError, match=f"{name}="):
            cache_fields(SCHEME, SCHEME, **good | {name: value})
