"""What a model says of its cache: read back as written, of the sizes that the operator wants."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsq_ref import Scheme
from nsq_ref.scheme import KeyValueSchemes
from onnx_export.operators import cache_fields
from onnx_export.operators.cache_layout import KEY, CacheLayout, CacheTensor, quantized_tensors

schemes = st.builds(
    Scheme,
    bits=st.sampled_from([2, 3, 4, 8]),
    separate_norm=st.booleans(),
    axis=st.sampled_from(["channel", "token"]),
    symmetric=st.booleans(),
    block_size=st.sampled_from([1, 8, 12, 32]),
    sink_tokens=st.sampled_from([0, 3]),
)


def layout_of(key: Scheme, value: Scheme, **shape: int) -> CacheLayout:
    tensors = quantized_tensors(0, key, value, **shape)
    multiple = int(np.lcm(key.block_size or 0, value.block_size or 0))
    roles = {"input_ids": "ids", "past_lengths": "past", "logits": "logits"}
    return CacheLayout(roles, tensors, (KeyValueSchemes(key, value), None), multiple, 4096)


@given(schemes, schemes, st.integers(1, 3), st.integers(1, 9), st.integers(1, 300))
def test_sizes_are_the_operator_s(
    key: Scheme, value: Scheme, batch: int, head_dim: int, capacity: int
) -> None:
    layout = layout_of(key, value, kv_heads=2, head_dim=head_dim)
    capacity = layout.rounded(capacity)
    fields = cache_fields(key, value, kv_heads=2, head_dim=head_dim, capacity=capacity)
    sizes = {
        tensor.past.removeprefix("past_key_values.0.").replace(".", "_"): (
            tensor.dtype,
            tensor.sizes(batch, capacity),
        )
        for tensor in layout.tensors
    }
    assert sizes == {
        name: (field.dtype.name, (batch, *field.shape)) for name, field in fields.items()
    }
    nbytes = sum(np.zeros(shape, dtype).nbytes for dtype, shape in sizes.values())
    assert layout.nbytes(batch, capacity) == nbytes
    assert CacheLayout.from_metadata(layout.to_metadata()) == layout


def test_the_side_of_the_padding_is_told() -> None:
    layout = CacheLayout({"attention_mask": "mask"}, (), (), right_padding=True)
    metadata = layout.to_metadata()
    assert CacheLayout.from_metadata(metadata).right_padding
    value = json.loads(metadata[KEY])
    del value["right_padding"]  # as written before there was such a thing
    assert not CacheLayout.from_metadata({KEY: json.dumps(value)}).right_padding


def test_a_cache_that_grows_begins_empty() -> None:
    tensor = CacheTensor("past", "present", "float32", ("batch", 3, "past", 64))
    assert tensor.grows
    assert tensor.sizes(2, 100) == (2, 3, 0, 64)


LAYOUT = layout_of(
    Scheme(block_size=32), Scheme(block_size=48), kv_heads=2, head_dim=16
).to_metadata()[KEY]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', "version 2 is not 1; update nsq"),
        ('"roles"', '"rolls"', "'roles' is missing"),
        ('"logits":', '"logit":', "roles has ['logit']"),
        ("present.0.key.packed", "past_key_values.0.key.packed", "is named twice"),
        ('"uint8"', '"float8"', "dtype 'float8'"),
        ('"batch"', '"rows"', "'rows' is no axis"),
        ('"capacity/32"', '"capacity/0"', "'capacity/0' is no axis"),
        ('"capacity/32"', '"capacity/64"', "n a divisor of 96"),
        ('"capacity/32"', "-1", "-1 is no axis"),
        ('"capacity_multiple": 96', '"capacity_multiple": 0', "capacity_multiple"),
        ('"context_length": 4096', '"context_length": "long"', "context_length"),
        ('"bits": 4', '"bits": 99', "bits"),
        ('"tensors": [', '"tensors": [3, ', "mapping"),
        ('"layer": 0', '"layer": 1', "layer 1 has no schemes"),
        ('"layer": 0', '"layer": 2', "layer=2"),
        ('"layer": 0', '"layer": null', "layer=None"),
        ('"part": "key_packed"', '"part": "keys"', "part 'keys' is not one of a cache: key_packed"),
        ("{", "[", "Expecting"),
    ],
)
def test_malformed_metadata_is_refused(old: str, new: str, message: str) -> None:
    assert old in LAYOUT
    with pytest.raises(ValueError, match=re.escape(f"the model's metadata {KEY!r}")) as caught:
        CacheLayout.from_metadata({KEY: LAYOUT.replace(old, new, 1)})
    assert message in str(caught.value)


def test_any_language_reads_it() -> None:
    value = json.loads(LAYOUT)
    assert value["tensors"][0] == {
        "past": "past_key_values.0.key.packed",
        "present": "present.0.key.packed",
        "dtype": "uint8",
        "shape": ["batch", 2, "capacity", 8],
        "layer": 0,
        "part": "key_packed",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([3], "key_feedback has 3; there are digests, and null"),
        ([None, "ab"], "layer 1 has no schemes, and no feedback"),
        (["ab", None, "ab"], "layer 2 has no schemes, and no feedback"),
    ],
)
def test_feedback_is_of_layers_that_are_quantized(given: list[object], message: str) -> None:
    value = json.loads(LAYOUT)
    assert "key_feedback" not in value
    value["key_feedback"] = ["ab", None]
    assert CacheLayout.from_metadata({KEY: json.dumps(value)}).key_feedback == ("ab", None)
    value["key_feedback"] = given
    with pytest.raises(ValueError, match=message):
        CacheLayout.from_metadata({KEY: json.dumps(value)})
