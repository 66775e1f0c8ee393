"""ONNX models as ports: right ones conform, wrong ones are told the rule, unusable ones why."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from nsq_ref import Feedback, Scheme, rounding
from nsq_ref.conformance.cases import cases
from nsq_ref.conformance.family import FAMILY
from nsq_ref.conformance.operations import Operation
from nsq_ref.conformance.ports.worker import Model, TargetError
from onnx_export import custom_ops
from onnx_export.operators.codec_models import quantize_model
from tests.support.command import said as run
from tests.support.onnx_ports import Mistake, Nodes, norm_of, save, save_decode, save_encode

NOT_ASKED = "input that must be refused, as a graph cannot refuse"


def check(*arguments: object, code: int = 0) -> str:
    text = run("check", *arguments, "--dtype", "float32", code=code)
    assert "Traceback" not in text
    return text


@pytest.fixture
def encode(tmp_path: Path) -> str:
    return save_encode(tmp_path / "encode.onnx")


@pytest.fixture
def decode(tmp_path: Path) -> str:
    return save_decode(tmp_path / "decode.onnx")


def test_right_models_conform(encode: str, decode: str) -> None:
    """N1 N2 S1 S3 Q1 Q2 P1 M1 D1: standard operators, as ONNX Runtime optimises them."""
    text = check(encode, "--decode", decode)
    asked = Counter(
        case.operation
        for case in cases(Scheme(), ["encode", "decode"], 0, ("float32",))
        if case.refused_by is None
    )
    assert "CONFORMS SO FAR to nsep+pchan4: " in text
    assert f"encode {asked['encode']} cases, decode {asked['decode']}" in text
    assert NOT_ASKED in " ".join(text.split())
    assert "not implemented" not in text


def test_a_model_with_feedback_conforms(tmp_path: Path) -> None:
    """F1: the operator's function takes order and factor under the names of a case's arrays."""
    name = "nsep+pchan4-outliers"
    feedback = Feedback([[0, 1]], np.eye(2, dtype=np.float32)[None])
    model = quantize_model(FAMILY[name], feedback=feedback)
    del model.graph.initializer[:]
    for what, kind, axes in (("order", TensorProto.INT32, 2), ("factor", TensorProto.FLOAT, 3)):
        model.graph.input.append(helper.make_tensor_value_info(what, kind, [None] * axes))
    onnx.save(model, tmp_path / "feedback.onnx")
    text = check("--feedback", tmp_path / "feedback.onnx", "--scheme", name)
    assert f"CONFORMS SO FAR to {name}: feedback " in text
    assert NOT_ASKED in " ".join(text.split())


@pytest.mark.parametrize("native", [False, True], ids=["functions", "library"])
def test_exported_models_conform(tmp_path: Path, native: bool) -> None:
    """I2 M4: kernels are asked what must be refused, graphs of standard operators are not."""
    run("onnx", "codec", "nsep+pchan4", "--output", tmp_path)
    models = [tmp_path / "encode.onnx", "--decode", tmp_path / "decode.onnx"]
    library = ["--custom-ops", custom_ops.library_path()] if native else []
    text = check(*models, *library, "--quick")
    assert "CONFORMS SO FAR to nsep+pchan4: " in text
    assert (NOT_ASKED in " ".join(text.split())) is not native


def test_a_model_beside_a_library_that_refuses(encode: str) -> None:
    """I2: operators that are given may refuse, and so this model must."""
    text = check(encode, "--custom-ops", custom_ops.library_path(), "--quick", code=1)
    assert "input that must be refused was taken" in text


def test_other_dtypes_are_not_implemented(encode: str) -> None:
    """I1: a graph takes one dtype; cases of the others fail the check unless they are let pass."""
    text = run("check", encode, code=1)
    assert re.search(
        r"Not implemented, which fails the check: \d+ cases\n +encode/input-dtype/0", text
    )
    assert "CONFORMS SO FAR to nsep+pchan4: " in run("check", encode, "--partial")


@pytest.mark.parametrize(
    ("operation", "mistake", "rule"),
    [
        ("encode", "nibbles swapped", "P1"),
        ("decode", "nibbles swapped", "P1"),
        ("encode", "reciprocal of the scale", "Q1"),
        ("encode", "norm in float32", "N1"),
        ("decode", "norm in float32", "D1"),
        ("decode", "not renormalised", "D1"),
    ],
)
def test_a_wrong_model_is_told_the_rule(
    tmp_path: Path, operation: str, mistake: Mistake, rule: str
) -> None:
    """P1 Q1 N1 D1: the rule that is broken comes first."""
    path = tmp_path / "wrong.onnx"
    if operation == "encode":
        text = check(save_encode(path, mistake), code=1)
    else:
        text = check("--decode", save_decode(path, mistake), code=1)
    assert "DOES NOT CONFORM to nsep+pchan4" in text
    assert re.findall(r"^([A-Z]\d)  ", text, re.MULTILINE)[0] == rule


# --- models that are not ports of NSQ-1 ---------------------------------------------------------


def model(path: Path, given: str, operator: str, *values: Any, gives: str, kind: int) -> str:
    """Write a model of one operator."""
    add = Nodes()
    to = {"to": kind} if operator == "Cast" else {}
    add(operator, given, *values, name=gives, **to)
    return save(path, add, {given: TensorProto.FLOAT}, {gives: kind})


def test_a_model_with_a_part_too_few(tmp_path: Path) -> None:
    """P1 S1 M1: what is missing, and what is of another dtype, is said."""
    text = check(
        model(tmp_path / "m.onnx", "x", "Abs", gives="norm", kind=TensorProto.FLOAT), code=1
    )
    for says in ("packed is missing", "scale is missing", "norm has another dtype and shape"):
        assert says in text


@pytest.mark.parametrize(
    ("operator", "values", "kind", "says"),
    [
        ("Cast", [], TensorProto.DOUBLE, "norm is tensor(double), which no part is"),
        ("Unsqueeze", [[0, 1, 2]], TensorProto.FLOAT, "norm is float32 [1, 1, 1, 6, 8]"),
    ],
)
def test_an_output_that_no_part_can_be(
    tmp_path: Path, operator: str, values: list[Any], kind: int, says: str
) -> None:
    path = model(tmp_path / "m.onnx", "x", operator, *values, gives="norm", kind=kind)
    text = check(path, "--case", "encode/ordinary/0", code=1)
    assert "No answer. Mend this first" in text
    assert says in text


def test_names_that_no_case_has(tmp_path: Path, decode: str) -> None:
    """An input or output with a name of its own could never be fed or judged."""
    path, kind = tmp_path / "m.onnx", TensorProto.FLOAT
    says = "has the output 'norms'; rename or remove it, as the outputs of encode are packed, scale"
    assert says in check(model(path, "x", "Abs", gives="norms", kind=kind), code=2)
    with pytest.raises(TargetError, match=r"'input'; .* the inputs of encode are x$"):
        Model(model(path, "input", "Abs", gives="norm", kind=kind), "encode", None)
    with pytest.raises(TargetError, match=r"'y'; .* the outputs of decode are x_hat$"):
        Model(model(path, "norm", "Abs", gives="y", kind=kind), "decode", None)
    with pytest.raises(TargetError, match=r"has the input 'packed'"):
        Model(decode, "encode", None)


@pytest.mark.parametrize(("operation", "name"), [("attend", "query"), ("stream", "steps")])
def test_names_of_other_operations(tmp_path: Path, operation: Operation, name: str) -> None:
    """A1 B1: models for these take and give other arrays."""
    gives, kind = {"attend": "output", "stream": "tail"}[operation], TensorProto.FLOAT
    Model(model(tmp_path / "m.onnx", name, "Abs", gives=gives, kind=kind), operation, None)


def test_files_that_are_no_models(tmp_path: Path, encode: str) -> None:
    path = tmp_path / "broken.onnx"
    path.write_text("no model")
    assert "broken.onnx cannot be loaded: " in check(path, code=2)
    for data in (b"", Path(encode).read_bytes()[:1000]):
        path.write_bytes(data)
        with pytest.raises(TargetError, match=r"broken.onnx cannot be loaded: "):
            Model(str(path), "encode", None)


# --- the norm -----------------------------------------------------------------------------------


def test_the_norm_of_a_graph(tmp_path: Path) -> None:
    """N1: next to midpoints, subnormal, and beyond float32."""
    add = Nodes()
    add("Identity", norm_of(add, "x"), name="norm")
    path = save(tmp_path / "norm.onnx", add, {"x": TensorProto.FLOAT}, {"norm": TensorProto.FLOAT})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tie = np.array([1, 2.0**-12, 2.0**-12, 0, 2.0**-24, 0])  # the root is 1 + 2^-24
    odd = np.array([1, 2.0**-11, 2.0**-12, 2.0**-12, 3 * 2.0**-24, 0])  # and 1 + 3 * 2^-24
    rows = []
    for row in (tie, odd):
        for change in (1 - 2.0**-23, 1, 1 + 2.0**-23):
            moved = row * [1, 1, 1, 1, change, 1]  # float64 cannot tell one from the other
            rows += [moved, moved * 2.0**60, moved * 2.0**-60]
        rows += [np.array([*row[:5], least]) for least in (2.0**-30, 2.0**-60, 2.0**-149)]
    rng = np.random.default_rng(0)
    rows += list(np.ldexp(rng.integers(-3, 4, (64, 6)).astype(np.float64), -149))
    rows += list(np.ldexp(rng.integers(-(2**23), 2**23, (256, 6)).astype(np.float64), -149))
    rows += list(np.ldexp(rng.standard_normal((256, 6)), rng.integers(-140, 126, (256, 6))))
    largest = float(np.finfo(np.float32).max)
    rows += [np.array([largest, other, 0, 0, 0, 0]) for other in (1e30, 1.4e34, 1.4e35, largest)]
    x = np.array(rows, np.float32)
    (got,) = session.run(None, {"x": x})
    assert got.tobytes() == rounding.norm(x).tobytes()
