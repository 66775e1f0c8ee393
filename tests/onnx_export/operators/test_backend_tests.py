"""The vectors as tests of ONNX backends: ONNX's loader finds them, and runtimes agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from nsq_ref.conformance import vectors
from nsq_ref.dtypes import FLOAT_DTYPES
from onnx_export.custom_ops import register
from onnx_export.operators.backend_tests import save_backend_tests
from tests.support.command import said
from tests.support.onnx_runners import Run, as_optimized, evaluator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "nsq"
    assert said("vectors", "--onnx", path).startswith(f"{path}: ")
    return path


def protos(data_set: Path, kind: str) -> list[onnx.TensorProto]:
    """The tensors of a data set, in order."""
    number = len(list(data_set.glob(f"{kind}_*.pb")))
    return [onnx.load_tensor(data_set / f"{kind}_{i}.pb") for i in range(number)]


def failures(test: Path, run: Run, limit: int | None = None) -> list[str]:
    """The ids of cases whose outputs are not those that are written, in every bit."""
    model = onnx.load(test / "model.onnx")
    wrong = []
    for data_set in sorted(test.glob("test_data_set_*"))[:limit]:
        given = map(numpy_helper.to_array, protos(data_set, "input"))
        got = run({one.name: array for one, array in zip(model.graph.input, given, strict=True)})
        for one, proto in zip(model.graph.output, protos(data_set, "output"), strict=True):
            array, expected = np.asarray(got[one.name]), numpy_helper.to_array(proto)
            formats = [(one.dtype, one.shape, one.tobytes()) for one in (array, expected)]
            wrong += [proto.doc_string] if formats[0] != formats[1] else []
    return wrong


def native(model: onnx.ModelProto) -> Run:
    """The native library, in place of the functions."""
    options = onnxruntime.SessionOptions()
    register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [one.name for one in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def test_every_vector_is_there_once(folder: Path) -> None:
    """What is done, of encode and decode; ONNX's loader compares them without a tolerance."""
    wanted = {
        f"{name}/{vector.case.id}"
        for name in vectors.names()
        if name.startswith(("encode", "decode"))
        for vector in vectors.load(name)
        if vector.case.refused_by is None
    }
    tests = load_model_tests(str(folder.parent), folder.name)
    assert {(test.rtol, test.atol) for test in tests} == {(0, 0)}
    names = {name.replace("+", "_").replace("-", "_"): name for name in vectors.SCHEMES}
    found = []
    for test in tests:
        path = Path(str(test.model_dir))
        verb, scheme = test.name.rsplit("_", 2)[0].removeprefix("test_nsq_").split("_", 1)
        operation = {"quantize": "encode", "dequantize": "decode"}[verb]
        for data_set in path.glob("test_data_set_*"):
            output = onnx.load_tensor(data_set / "output_0.pb")
            found.append(f"{operation}-{names[scheme]}/{output.doc_string}")
    assert len(found) == len(set(found))
    assert set(found) == wanted


@pytest.mark.parametrize("name", ["quantize_nsep_pchan4", "dequantize_streaming4"])
def test_runtimes_agree(name: str, folder: Path) -> None:
    """N1 S1 S2 Q1 P1 M1 M3 D1: functions of standard operators, and the native library."""
    number = 0
    for dtype in FLOAT_DTYPES:
        for test in folder.glob(f"test_nsq_{name}_{dtype}_?d"):
            model = onnx.load(test / "model.onnx")
            onnx.checker.check_model(model, full_check=True)
            assert failures(test, as_optimized(model)) == []
            if dtype != "bfloat16":  # which a session cannot be given as an array
                assert failures(test, native(model)) == []
            number += 1
    assert number > 3


def test_onnx_itself_agrees(folder: Path) -> None:
    """I1 D1: its reference evaluator, in bfloat16 too."""
    for name in ("quantize_pchan4_bfloat16_2d", "dequantize_naive4_float32_2d"):
        test = folder / f"test_nsq_{name}"
        assert failures(test, evaluator(onnx.load(test / "model.onnx")), 6) == []


def test_another_model_fails(folder: Path) -> None:
    """M2: the data sets of one scheme are not those of another."""
    other = onnx.load(folder / "test_nsq_quantize_nsep_pchan4_gain_float32_2d" / "model.onnx")
    assert failures(folder / "test_nsq_quantize_nsep_pchan4_float32_2d", as_optimized(other))


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    """And what cannot be written leaves nothing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is there, and not empty"):
        save_backend_tests(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "nothing to write was named" in said("vectors", code=2)
    with pytest.raises(OSError, match="file"):
        save_backend_tests(tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
