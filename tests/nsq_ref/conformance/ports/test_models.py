"""ONNX models as ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import onnx
import pytest
from onnx import TensorProto, helper

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance.operations import (
    NOT_IMPLEMENTED,
    REFUSED,
)
from nsq_ref.conformance.ports import (
    open_port,
)
from tests.support.asked import (
    PCHAN,
    answered,
    arrays_of,
    case,
    decode_case,
    equal,
    normal,
)


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], values: Any) -> str:
    constants = [
        helper.make_tensor(name, kind, [len(value)], value) for name, kind, value in values
    ]
    graph = helper.make_graph(nodes, "port", inputs, outputs, constants)
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return str(path)


def decode_model(path: Path, scale_type: int) -> str:
    """D1 of pchan4 for an even number of channels."""
    node = helper.make_node
    nodes = [
        node("BitwiseAnd", ["packed", "fifteen"], ["low"]),
        node("BitShift", ["packed", "four"], ["high"], direction="RIGHT"),
        node("Unsqueeze", ["low", "last"], ["even"]),
        node("Unsqueeze", ["high", "last"], ["odd"]),
        node("Concat", ["even", "odd"], ["pairs"], axis=-1),
        node("Reshape", ["pairs", "rows"], ["raw"]),
        node("Cast", ["raw"], ["numbers"], to=TensorProto.FLOAT),
        node("Sub", ["numbers", "offset"], ["codes"]),
        node("Cast", ["scale"], ["factor"], to=TensorProto.FLOAT),
        node("Mul", ["codes", "factor"], ["x_hat"]),
    ]
    tensor = helper.make_tensor_value_info
    values = [
        ("fifteen", TensorProto.UINT8, [15]), ("four", TensorProto.UINT8, [4]),
        ("last", TensorProto.INT64, [-1]), ("rows", TensorProto.INT64, [0, -1]),
        ("offset", TensorProto.FLOAT, [8.0]),
    ]  # fmt: skip
    inputs = [
        tensor("packed", TensorProto.UINT8, ["tokens", "row"]),
        tensor("scale", scale_type, [1, "head_dim"]),
    ]
    outputs = [tensor("x_hat", TensorProto.FLOAT, ["tokens", "head_dim"])]
    return save(path, nodes, inputs, outputs, values)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_a_model_decodes(tmp_path: Path, name: Any) -> None:
    """D1: in every bit; other schemes it does not implement, and says why."""
    kind = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}.get(name, 1)
    scheme = Scheme(separate_norm=False, scale_dtype=name)
    port = open_port(decode=decode_model(tmp_path / "decode.onnx", kind))
    x = normal(9, 6)
    got = arrays_of(port.ask(0, decode_case(x, scheme)))
    equal(got, {"x_hat": nsq.dequantize(nsq.quantize(x, scheme))})
    others = {
        "the model has no input norm": decode_case(x, Scheme(scale_dtype=name)),
        "the model takes packed of shape ['tokens', 'row']": decode_case(normal(2, 9, 6), scheme),
        "the model takes scale of shape [1, 'head_dim']": decode_case(
            x, Scheme(separate_norm=False, block_size=2, scale_dtype=name)
        ),
        f"the model takes scale as {name}": decode_case(
            x,
            Scheme(separate_norm=False, scale_dtype="float16" if name != "float16" else "float32"),
        ),
        "the model takes packed, which the case does not have": case("decode", PCHAN, x=x),
    }
    for says, asked in others.items():
        answer = answered(port.ask(1, asked))
        assert (answer.status, answer.message) == (NOT_IMPLEMENTED, says)
    port.close()


def test_a_model_encodes(tmp_path: Path) -> None:
    """Outputs have the names of parts; bfloat16 comes through; errors of the runtime refuse."""
    tensor = helper.make_tensor_value_info
    path = save(
        tmp_path / "encode.onnx",
        [
            helper.make_node("Identity", ["x"], ["sinks"]),
            helper.make_node("Reshape", ["x", "shape"], ["scale"]),
        ],
        [tensor("x", TensorProto.BFLOAT16, None)],
        [tensor("sinks", TensorProto.BFLOAT16, None), tensor("scale", TensorProto.BFLOAT16, None)],
        [("shape", TensorProto.INT64, [2, 6])],
    )
    port = open_port(path)
    x = normal(3, 4).astype(ml_dtypes.bfloat16)
    equal(arrays_of(port.ask(0, case(x=x))), {"sinks": x, "scale": x.reshape(2, 6)})
    refused = answered(port.ask(1, case(x=x[:, :3])))
    assert (refused.status, "reshaped" in refused.message) == (REFUSED, True), refused
    answer = answered(port.ask(2, case(x=normal(3, 4))))
    assert (answer.status, answer.message) == (NOT_IMPLEMENTED, "the model takes x as bfloat16")
    port.close()


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_text("no model")
    with pytest.raises(ValueError, match=r"broken.onnx cannot be loaded: "):
        open_port(str(broken))
    good = decode_model(tmp_path / "good.onnx", TensorProto.FLOAT16)
    with pytest.raises(ValueError, match=r"custom_ops: there is no file none.so"):
        open_port(decode=good, custom_ops="none.so")
    with pytest.raises(ValueError, match=r"good.onnx cannot be loaded: .*broken.onnx"):
        open_port(decode=good, custom_ops=str(broken))
