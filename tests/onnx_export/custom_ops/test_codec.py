"""The native Quantize and Dequantize, on every instruction set, beside the reference.

The models here carry no function bodies, so that nothing but the library can answer.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

import nsq_ref as nsq
from nsq_ref import Scheme, strategies
from nsq_ref.codec import PARTS, Quantized
from nsq_ref.conformance.family import scheme_named
from nsq_ref.conformance.operations import DONE, REFUSED, Answer, Case, Operation
from nsq_ref.conformance.ports.worker import Model
from onnx_export import custom_ops
from onnx_export.operators import (
    DOMAIN,
    VERSION,
    dequantize_model,
    quantize_model,
    scheme_attributes,
)
from tests.support.cases import cases_of
from tests.support.processors import CPUS, sessions_on

Array = npt.NDArray[Any]

ROOT = Path(__file__).parents[3]
SCHEMES = (
    "nsep+pchan4", "nsep+pchan3", "nsep+pchan2", "nsep+pchan8", "naive4", "pchan3", "nsep2",
    "nsep+out4", "outlier8", "streaming4", "streaming3", "streaming2", "nsep+pchan4-gain",
    "nsep+pchan4-lsq", "nsep+pchan4-bfloat16", "nsep+pchan4-float32", "nsep+pchan4-lsq-float32",
    "nsep+pchan4-asymmetric", "nsep+pchan4-asymmetric-float32", "nsep+pchan4-search",
    "nsep+pchan4-outliers", "nsep+pchan4-blocks",
)  # fmt: skip
NUMBER_TYPES = {"uint8": TensorProto.UINT8, "int32": TensorProto.INT32, "int64": TensorProto.INT64}
FLOAT_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
TYPES = {**NUMBER_TYPES, **FLOAT_TYPES}


@pytest.fixture(scope="module", params=CPUS)
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Sessions that are made now run this instruction set."""
    with sessions_on(request.param):
        yield request.param


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.functions[:]
    return model


def session_of(model: onnx.ModelProto, **config: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, too
    for name, value in config.items():
        options.add_session_config_entry(f"session.{name}", value)
    custom_ops.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


class Native:
    """Models of one scheme and one dtype, and a session of each on every instruction set."""

    def __init__(self, folder: Path, scheme: Scheme, dtype: Any, cpus: Sequence[str]) -> None:
        self._models: dict[Operation, list[Model]] = {}
        made = {"encode": quantize_model, "decode": dequantize_model}
        for operation in ("encode", "decode"):
            path = folder / f"{operation}.onnx"
            onnx.save(without_functions(made[operation](scheme, dtype)), path)
            self._models[operation] = []
            for cpu in cpus:
                with sessions_on(cpu):
                    model = Model(str(path), operation, str(custom_ops.library_path()))
                self._models[operation].append(model)

    def ask(
        self, operation: Operation, scheme: Scheme, inputs: Mapping[str, Array]
    ) -> Iterator[Answer]:
        """The answer of each instruction set."""
        for model in self._models[operation]:
            answer = model.ask(0, Case("one", operation, scheme, (), inputs))
            assert isinstance(answer, Answer)
            yield answer


def assert_same(got: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        assert (got[name].shape, got[name].dtype) == (part.shape, part.dtype), name
        assert got[name].tobytes() == part.tobytes(), name


def assert_agrees(native: Native, scheme: Scheme, x: Array) -> None:
    """Both quantize and dequantize `x` to the same bytes, or both refuse it."""
    try:
        q = nsq.quantize(x, scheme)
    except ValueError:
        assert {one.status for one in native.ask("encode", scheme, {"x": x})} == {REFUSED}
        return
    x_hat = nsq.dequantize(q)
    for answer in native.ask("encode", scheme, {"x": x}):
        assert answer.status == DONE, answer.message
        assert_same(answer.arrays, q.parts)
    parts = {**q.parts, "shape": np.array(q.shape, np.int32)}
    for decoded in native.ask("decode", scheme, parts):
        assert_same(decoded.arrays, {"x_hat": x_hat})


# --- bytes --------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_scheme(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """N1 N2 N3 S1 S2 S3 S4 S5 O1 Q1 Q2 P1 M1 M2 M3 M4 D1 D3 Z1 I1 K1 B1: equal bytes or refused."""
    dtypes = ("float32", "float16", "bfloat16")
    x = data.draw(strategies.tensors(max_tokens=9, max_head_dim=70, dtypes=dtypes))
    scheme = data.draw(strategies.schemes())
    folder = tmp_path_factory.mktemp("models")
    assert_agrees(Native(folder, scheme, x.dtype.name, CPUS), scheme, x)


@pytest.mark.parametrize("name", SCHEMES)
def test_conformance_cases(tmp_path: Path, name: str) -> None:
    """N1 Q1 S3 M3 M4 S5 D3: ties, neighbours of ties and ends of ranges; what is refused is."""
    scheme = scheme_named(name)
    natives = {dtype: Native(tmp_path, scheme, dtype, CPUS) for dtype in strategies.DTYPES[:3]}
    asked = 0
    for case in cases_of(scheme, ["encode", "decode"]):
        asked += 1
        if case.operation == "encode":
            x = case.inputs["x"]
            answers = natives[x.dtype.name].ask("encode", scheme, case.inputs)
            if case.refused_by is not None:
                for answer in answers:
                    assert answer.status == REFUSED, case
                    assert answer.message.rstrip().endswith(f"(rule {case.refused_by})"), case
                continue
            expected: Mapping[str, Array] = nsq.quantize(x, scheme).parts
        else:
            parts = {name: part for name, part in case.inputs.items() if name in PARTS}
            dtype = parts["sinks"].dtype if "sinks" in parts else np.dtype(np.float32)
            answers = natives[dtype.name].ask("decode", scheme, case.inputs)
            shape = tuple(case.inputs["shape"].tolist())
            expected = {"x_hat": nsq.dequantize(Quantized(scheme, shape, dtype, **parts))}
        for answer in answers:
            assert answer.status == DONE, (case, answer.message)
            assert_same(answer.arrays, expected)
    assert asked > 100


@pytest.mark.parametrize("block_size", [None, 100])
@pytest.mark.parametrize("name", ["nsep+pchan4", "streaming3", "naive2", "nsep+out4"])
def test_many_tokens_and_channels(tmp_path: Path, name: str, block_size: int | None) -> None:
    """B1 P1: work is cut into tasks and tiles, which do not show in the bytes."""
    scheme = scheme_named(name)
    scheme = Scheme.from_dict({**scheme.to_dict(), "block_size": block_size})
    native = Native(tmp_path, scheme, "float32", CPUS)
    rng = np.random.default_rng(0)
    for shape in ((3, 1030, 64), (1, 2, 130, 521), (2, 3, 5000)):
        assert_agrees(native, scheme, rng.standard_normal(shape, dtype=np.float32))


def test_a_norm_that_float64_cannot_tell(tmp_path: Path) -> None:
    """N1: exact ties go to even, and what is just beside a tie does not."""
    scheme = Scheme(norm_dtype="float32")
    tie = [1, 2.0**-12, 2.0**-12, 2.0**-24, 0]
    above = [1, 2.0**-12, 2.0**-12, 2.0**-24, 2.0**-30]
    x = np.float32([tie, above])
    for answer in Native(tmp_path, scheme, "float32", CPUS).ask("encode", scheme, {"x": x}):
        assert [float(value).hex() for value in answer.arrays["norm"]] == [
            "0x1.0000000000000p+0",
            "0x1.0000020000000p+0",
        ]


def test_of_equal_errors_the_wider_range_is_kept(tmp_path: Path) -> None:
    """S4: a scale of 2 units and one of 1 are as far from a value of 1.5."""
    x = np.float32([[1.5 * 2.0**-24]])
    for axis in ("channel", "token"):
        scheme = Scheme(bits=2, separate_norm=False, scale_rule="search", axis=axis)
        for answer in Native(tmp_path, scheme, "float32", CPUS).ask("encode", scheme, {"x": x}):
            assert answer.arrays["scale"].tolist() == [[2.0**-23]]


FLUSHING = """
import numpy as np
import nsq_ref as nsq
from onnx_export.operators import quantize_model
from tests.onnx_export.custom_ops.test_codec import session_of, without_functions

x = np.float32([[1e-40, 3e-40, -2e-41], [2e-42, 0, 1e-41]])
scheme = nsq.Scheme(norm_dtype="float32", magnitude="gain")
expected = nsq.quantize(x, scheme).parts
session = session_of(without_functions(quantize_model(scheme)), set_denormal_as_zero="1")
assert (x * np.float32(1) == 0).all()  # so it is in this thread, from its first session on
for name, part in zip(expected, session.run(list(expected), {"x": x})):
    assert part.tobytes() == expected[name].tobytes(), name
"""


def test_subnormals_are_kept_in_a_session_that_flushes_them() -> None:
    """N1 N2 Q1: whatever the session's threads do elsewhere."""
    command = [sys.executable, "-c", FLUSHING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_sinks(tmp_path: Path) -> None:
    """K1: without coded tokens there are no blocks."""
    for axis in ("channel", "token"):
        scheme = Scheme(axis=axis, sink_tokens=4, outlier_channels=1, symmetric=False)
        native = Native(tmp_path, scheme, "float16", CPUS)
        assert_agrees(native, scheme, np.ones((2, 3, 5), np.float16))


# --- refusals -----------------------------------------------------------------------------------

WIDE = {"scale_dtype": "float32", "norm_dtype": "float32"}


@pytest.mark.parametrize(
    ("fields", "value", "says"),
    [
        ({}, np.nan, r"x\[1, 4\]: a value is not finite; mask padding .*\(rule I2\)"),
        ({}, 70000, r"x\[1, 4\]: the norm .* float16; norm_dtype float32 holds it.*\(rule M4\)"),
        ({"norm_dtype": "bfloat16"}, 2.404e38, r"x\[1, 4\]: .* bfloat16; norm_dtype float32.*M4"),
        (WIDE, 3e38, r"x\[1, 4\]: the norm is beyond float32; scale the values down \(rule N1\)"),
        (
            {"separate_norm": False}, 1e6,
            r"channel 1 of the block from x\[1, 3\] on: .* float16; scale_dtype float32.*S5",
        ),
        ({"separate_norm": False, "axis": "token"}, 1e6, r"x\[1, 4\]: a scale .* float16;.*S5"),
        (
            {"separate_norm": False, "outlier_channels": 2, "scale_dtype": "float32"}, 1e6,
            r"x\[1, 4\]: an outlier is beyond float16.*outlier_channels=0 \(rule O1\)",
        ),
        (
            {"separate_norm": False, "scale_dtype": "bfloat16", "bits": 3},
            3.4e38, r"x\[1, 4\]: a value would decode beyond float32; .*\(rule D3\)",
        ),
    ],
)  # fmt: skip
def test_refused(cpu: str, fields: dict[str, Any], value: float, says: str) -> None:
    """I2 M4 N1 S5 O1 D3: the token, or the channel, is named, and the remedy."""
    scheme = Scheme(**{"block_size": 2, "sink_tokens": 1, **fields})
    session = session_of(without_functions(quantize_model(scheme)))
    x = np.ones((2, 6, 3), np.float32)
    x[1, 4, 1:] = value
    with pytest.raises(InvalidArgument, match=says):
        session.run(None, {"x": x})


def test_a_sink_that_is_not_finite_is_refused(cpu: str) -> None:
    """I2 K1: sinks are stored as they are, but not NaN."""
    model = without_functions(quantize_model(Scheme(sink_tokens=2), "float16"))
    x = np.ones((2, 2, 3), np.float16)
    x[1, 1, 2] = np.inf
    with pytest.raises(InvalidArgument, match=r"x\[1, 1\]: .* sink .* not finite.*\(rule I2\)"):
        session_of(model).run(None, {"x": x})


# --- what does not fit --------------------------------------------------------------------------

SCHEME = Scheme(symmetric=False, block_size=2, sink_tokens=1, outlier_channels=2)
Q = nsq.quantize(np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32), SCHEME)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"packed": Q.packed[0, 0]}, "packed has 1 axes; at least two are needed"),
        ({"packed": Q.packed[:0]}, r"scale has shape \[2, 3, 5\], expected \[0, 3, 5\]"),
        ({"packed": Q.packed[..., :2]}, r"packed has shape \[2, 5, 2\], expected \[2, 5, 3\]"),
        ({"packed": Q.packed[:, :4]}, r"scale has shape \[2, 3, 5\], expected \[2, 2, 5\]"),
        ({"scale": Q.scale[:, :2]}, r"scale has shape \[2, 2, 5\], expected \[2, 3, 5\]"),
        ({"scale": np.array(1, np.float16)}, r"scale has shape \[\], expected \[2, 3, 5\]"),
        ({"zero": Q.zero[..., :4]}, r"zero has shape \[2, 3, 4\], expected \[2, 3, 5\]"),
        ({"norm": Q.norm[:, :4]}, r"norm has shape \[2, 4\], expected \[2, 5\]"),
        ({"outlier_index": Q.outlier_index[..., :1]}, r"outlier_index has shape \[2, 3, 1\]"),
        ({"outlier_index": Q.outlier_index * 0 - 1}, "outlier_index has channel -1 at place 0"),
        ({"outlier_index": Q.outlier_index * 0 + 4}, "outlier_index has channel 4 at place 1"),
        ({"outlier_index": Q.outlier_index + 5}, r"channel \d at place 0 .* below head_dim=5"),
        ({"outliers": Q.outliers[..., :0]}, r"outliers has shape \[2, 5, 0\]"),
        ({"sinks": Q.sinks[:, :0]}, "sinks has 0 tokens beside 5 coded ones"),
        ({"sinks": np.ones((2, 2, 5), np.float32)}, "sinks has 2 tokens beside 5 coded ones"),
        ({"sinks": np.ones((2, 1, 4), np.float32)}, r"sinks has shape \[2, 1, 4\]"),
        ({"sinks": np.ones((1, 5), np.float32)}, r"sinks has shape \[1, 5\], expected 3 axes"),
        ({"shape": np.int32([2, 6, 6])}, r"scale has shape \[2, 3, 5\], expected \[2, 3, 6\]"),
        ({"shape": np.int32([2, 6, 0])}, "head_dim asks for 0 channels"),
        ({"shape": np.int32([2, 6, 2**31 - 1])}, "head_dim asks for 2147483647 channels"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(changed: dict[str, Array], says: str) -> None:
    """P1 S2 O1 K1: nothing is read past a tensor; the error names the input."""
    session = session_of(without_functions(dequantize_model(SCHEME)))
    feeds = {**Q.parts, "shape": np.int32([2, 6, 5]), **changed}
    with pytest.raises(InvalidArgument, match=says):
        session.run(None, feeds)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((5,), "x has 1 axes; at least two are needed"),
        ((2, 0, 5), "axis 1 of x is empty; leave such arrays out"),
        ((2, 5, 0), "axis 2 of x is empty"),
        ((1, 2**24 + 1), "x asks for 16777217 channels"),
    ],
)
def test_arrays_that_cannot_be_quantized(shape: tuple[int, ...], says: str) -> None:
    """I1: empty arrays are refused, and what is no array of tokens."""
    session = session_of(without_functions(quantize_model(Scheme())))
    with pytest.raises(InvalidArgument, match=says):
        session.run(None, {"x": np.zeros(shape, np.float32)})


def one_node(
    operator: str, scheme: Scheme, inputs: Mapping[str, str], outputs: Sequence[tuple[str, str]]
) -> onnxruntime.InferenceSession:
    """Make a session of one node; a dtype of "" leaves an input or output out."""
    ends = [
        [helper.make_tensor_value_info(one, TYPES[kind], None) for one, kind in end if kind]
        for end in (inputs.items(), outputs)
    ]
    names = [[one if kind else "" for one, kind in end] for end in (inputs.items(), outputs)]
    node = helper.make_node(operator, *names, domain=DOMAIN, **scheme_attributes(scheme))
    model = helper.make_model(
        helper.make_graph([node], "one", *ends),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    return session_of(model)


PART_TYPES = {
    "packed": "uint8", "scale": "float32", "norm": "float32", "zero": "float32",
    "outlier_index": "int32", "outliers": "float16", "sinks": "float32", "head_dim": "int64",
}  # fmt: skip
STORED = ("packed", "scale", "norm")


def as_fed(parts: Mapping[str, Array]) -> dict[str, Array]:
    """Return the parts in the dtypes of the operators."""
    return {name: np.asarray(part, PART_TYPES[name]) for name, part in parts.items()}


@pytest.mark.parametrize("name", ["zero", "outlier_index", "outliers", "sinks", "norm"])
def test_parts_that_are_left_out_or_too_many(name: str) -> None:
    """S2 O1 K1 M1: the scheme of the attributes tells which parts there are."""
    q = nsq.quantize(np.ones((4, 3), np.float32))
    stored = [one for one in STORED if one != name] if name == "norm" else [*STORED, name]
    kinds = {one: kind if one in stored else "" for one, kind in PART_TYPES.items()}
    says = "left out, but the scheme" if name == "norm" else "not stored by the scheme"

    fed = as_fed({one: q.parts.get(one, np.zeros((1, 1))) for one in stored})
    with pytest.raises(InvalidArgument, match=f"Dequantize: {name} is {says}"):
        one_node("Dequantize", q.scheme, kinds, [("x_hat", "float32")]).run(None, fed)

    outputs = [(one, kind) for one, kind in kinds.items() if one != "head_dim"]
    session = one_node("Quantize", q.scheme, {"x": "float32"}, outputs)
    with pytest.raises(InvalidArgument, match=f"Quantize: {name} is {says}"):
        session.run(None, {"x": np.ones((4, 3), np.float32)})


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_head_dim_is_optional_where_scales_tell_it(axis: Any) -> None:
    """S1 S2: scales of channels are as many as channels, scales of tokens are not."""
    q = nsq.quantize(np.float32([[3, 4, 1], [-1.5, 2, 0]]), Scheme(axis=axis))
    kinds = {name: PART_TYPES[name] for name in STORED}
    session = one_node("Dequantize", q.scheme, kinds, [("x_hat", "float32")])
    if axis == "channel":
        assert session.run(None, as_fed(q.parts))[0].tobytes() == nsq.dequantize(q).tobytes()
    else:
        with pytest.raises(InvalidArgument, match="head_dim is left out; scales of tokens"):
            session.run(None, as_fed(q.parts))


@pytest.mark.parametrize("head_dim", [[3, 3], []])
def test_head_dim_is_one_number(head_dim: list[int]) -> None:
    """P1: how many channels a row has."""
    q = nsq.quantize(np.float32([[3, 4, 1], [-1.5, 2, 0]]), Scheme(axis="token"))
    stored = {"packed", "scale", "norm", "head_dim"}
    kinds = {name: kind if name in stored else "" for name, kind in PART_TYPES.items()}
    session = one_node("Dequantize", q.scheme, kinds, [("x_hat", "float32")])
    right = session.run(None, as_fed({**q.parts, "head_dim": np.int64([3])}))[0]
    assert right.tobytes() == nsq.dequantize(q).tobytes()
    with pytest.raises(InvalidArgument, match=f"head_dim has {len(head_dim)} elements; give one"):
        session.run(None, as_fed({**q.parts, "head_dim": np.array(head_dim)}))
