"""Tensors of torch, wherever arrays, integers and outputs are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nsq_ref as nsq
from nsq_ref import arrays
from tests.nsq_ref import test_intake as intake
from tests.nsq_ref.test_intake import CALLS, Integer, Integers, Number, Numbers

INTEGER_DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


def tensor_of(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype == arrays.INPUT_DTYPES[2]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("name", CALLS)
def test_every_function_takes_tensors(name: str) -> None:
    function, arguments = CALLS[name]
    expected = function(**intake.plain(arguments))
    for key, argument in arguments.items():
        if isinstance(argument, Numbers):
            form = intake.mapped(argument.value, lambda array: tensor_of(array.copy()))
        elif isinstance(argument, Integer | Integers | Number):
            form = torch.tensor(argument.value)
        else:
            continue
        found = function(**intake.plain(arguments) | {key: form})
        assert intake.same(found, expected), key


@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_need_a_gradient_are_refused_by_name(name: str) -> None:
    function, arguments = CALLS[name]
    for key, argument in arguments.items():
        if not isinstance(argument, Numbers):
            continue
        form = intake.mapped(
            argument.value, lambda array: torch.zeros(array.shape, requires_grad=True)
        )
        with pytest.raises(TypeError, match=r"cannot be read as an array .*grad.*detach") as caught:
            function(**intake.plain(arguments) | {key: form})
        ours = {"source": "a piece", "keys": "a piece", "values": "a piece"}
        assert key in str(caught.value) or ours[key] in str(caught.value)


def test_integers() -> None:
    for dtype in INTEGER_DTYPES:
        assert arrays.as_integer("n", torch.tensor(3, dtype=dtype)) == 3
        assert arrays.as_integers("n", torch.tensor([3, 1], dtype=dtype)) == [3, 1]
        assert arrays.as_integers("n", list(torch.tensor([3, 1], dtype=dtype))) == [3, 1]
    for wrong in (torch.tensor(True), torch.tensor(3.0), torch.tensor([3])):
        with pytest.raises(TypeError, match=r"n=.* is not an integer"):
            arrays.as_integer("n", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_not_copied(dtype: Any) -> None:
    """I1."""
    x = torch.randn(2, 6, 8).to(dtype)
    for tensor in (x, x.transpose(0, 1), x[:, ::2]):
        taken = arrays.as_float_array("x", tensor)
        assert taken.__array_interface__["data"][0] == tensor.data_ptr()
        assert taken.astype(np.float64).tolist() == tensor.double().tolist()


def test_a_tensor_to_write_to() -> None:
    quantized = nsq.quantize(torch.randn(2, 6, 8), "streaming4")
    out = torch.full((2, 6, 8), torch.nan)
    assert nsq.dequantize(quantized, out=out) is out
    assert out.numpy().tobytes() == nsq.dequantize(quantized).tobytes()
    refused: list[tuple[Any, str]] = [
        (torch.empty(2, 6, 8, dtype=torch.float64), "out must be a float32 array"),
        (torch.empty(2, 6, 8, dtype=torch.bfloat16), "out must be a float32 array"),
        (torch.empty(2, 6, 9), "out must be a float32 array"),
        (torch.empty(2, 8, 6).transpose(1, 2), "out must be C-contiguous and writeable"),
        (torch.empty(2, 6, 8, requires_grad=True), "out cannot be read as an array"),
        (torch.empty(2, 6, 8, device="meta"), "out cannot be read as an array"),
    ]
    for wrong, message in refused:
        with pytest.raises((TypeError, ValueError), match=message):
            nsq.dequantize(quantized, out=wrong)
