"""Models that quantize and dequantize: judged by the conformance kit, written by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from nsq_ref import SPEC_VERSION, Scheme
from nsq_ref.codec import PARTS
from nsq_ref.conformance.check import run
from nsq_ref.conformance.family import FAMILY
from nsq_ref.conformance.operations import DONE, Answer, Case
from nsq_ref.conformance.report import as_text
from onnx_export.operators import dequantize_model, quantize_model, save_models
from tests.support.cases import cases_made_once, cases_of, checking
from tests.support.command import nsq, refused
from tests.support.onnx_runners import RUNNERS, Run

__all__ = ["cases_made_once"]  # the fixture

# Every family of names, width, axis, factor and option once.
FEW = (
    "naive3", "pchan2", "nsep8", "nsep+out4", "nsep+pchan4", "streaming3", "streaming2",
    "nsep+pchan4-gain", "nsep+pchan4-lsq-float32", "nsep+pchan4-bfloat16", "nsep+pchan4-search",
    "nsep+pchan4-blocks",
)  # fmt: skip


OLDEST = onnxruntime.__version__.startswith("1.22.")


def cases_of_some_sequences(*given: Any) -> list[Case]:
    def shape(case: Case) -> tuple[int, ...]:
        return case.inputs["x"].shape if "x" in case.inputs else tuple(case.inputs["shape"])

    return [case for case in cases_of(*given) if 0 not in shape(case)[:-2]]


class Models:
    """The models of a scheme as a port: one of each dtype, made when it is asked for."""

    name = "models"

    def __init__(self, scheme: Scheme, runner: Callable[[onnx.ModelProto], Run]) -> None:
        self._scheme, self._runner = scheme, runner
        self._runs: dict[tuple[str, str], Run] = {}

    def ask(self, number: int, case: Case) -> Answer:
        typed: npt.NDArray[Any] = np.zeros(0, np.float32)  # a decoder without sinks needs no dtype
        dtype = case.inputs.get("x", case.inputs.get("sinks", typed)).dtype.name
        kind = case.operation, dtype
        if kind not in self._runs:
            make = quantize_model if case.operation == "encode" else dequantize_model
            self._runs[kind] = self._runner(make(self._scheme, dtype))
        return Answer(DONE, self._runs[kind](case.inputs))

    def close(self) -> None:
        pass


def assert_conforms(name: str, runner: str) -> None:
    port = Models(FAMILY[name], RUNNERS[runner])
    with pytest.MonkeyPatch.context() as patch:
        # onnxruntime 1.22 reduces arrays of no sequence to another shape, and onnx.reference's
        # GatherND takes none.
        if OLDEST or runner == "onnx.reference":
            patch.setattr(checking, "cases", cases_of_some_sequences)
        report = run(port, [(name, FAMILY[name])], ["encode", "decode"], refusals=False)
    assert report.conforms, as_text(report, color=False)


@pytest.mark.parametrize("name", FAMILY)
def test_models_conform(name: str) -> None:
    """N1 N2 O1 S1 S2 S3 S4 Q1 Q2 P1 M1 M2 M3 D1 Z1 K1 B1 I1. Every case, without latitude."""
    assert_conforms(name, "onnxruntime")


@pytest.mark.parametrize("runner", [name for name in RUNNERS if name != "onnxruntime"])
@pytest.mark.parametrize("name", FEW)
def test_models_conform_on_other_runtimes(name: str, runner: str) -> None:
    """N1 N2 O1 S1 S2 S3 S4 Q1 Q2 P1 M1 M2 M3 D1 Z1 K1 B1 I1. Every case, without latitude."""
    assert_conforms(name, runner)


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("name", FEW)
def test_models_are_valid(name: str, rank: int) -> None:
    """The checker of ONNX finds nothing, types and shapes inferred and all."""
    scheme = FAMILY[name]
    for dtype in ("float32", "bfloat16"):
        for make in (quantize_model, dequantize_model):
            onnx.checker.check_model(make(scheme, dtype, rank), full_check=True)


def test_what_a_model_holds() -> None:
    """P1. One node, the function it uses, and the names and dtypes of the stored parts."""
    scheme = Scheme(symmetric=False, sink_tokens=1, outlier_channels=2, norm_dtype="bfloat16")
    encode, decode = (make(scheme, "float16") for make in (quantize_model, dequantize_model))
    for model, operator in ((encode, "Quantize"), (decode, "Dequantize")):
        assert [one.op_type for one in model.graph.node if one.domain == "nsq"] == [operator]
        assert [one.name for one in model.functions] == [operator]
        held = {one.key: one.value for one in model.metadata_props}
        assert held["nsq.spec"] == SPEC_VERSION
        assert Scheme.from_dict(json.loads(held["nsq.scheme"])) == scheme
    kinds = [one.type.tensor_type.elem_type for one in encode.graph.output]
    assert [one.name for one in encode.graph.output] == list(PARTS)
    assert kinds == [2, 10, 16, 10, 6, 10, 10]
    assert [one.type.tensor_type.elem_type for one in decode.graph.input] == [*kinds, 6]
    assert [one.name for one in decode.graph.input] == [*PARTS, "shape"]


@pytest.mark.parametrize("make", [quantize_model, dequantize_model])
def test_bad_arguments(make: Callable[..., onnx.ModelProto]) -> None:
    """I1. What no array can have."""
    with pytest.raises(ValueError, match="dtype='float64' is not one of float16, bfloat16"):
        make(Scheme(), "float64")
    with pytest.raises(ValueError, match="rank=1 is too small"):
        make(Scheme(), rank=1)


def test_models_are_written_together(tmp_path: Path) -> None:
    """Where one cannot be written, none is, and nothing is left."""
    models = {tmp_path / name: quantize_model(Scheme()) for name in ("one", "two")}
    (tmp_path / "two").mkdir()
    with pytest.raises(FileExistsError, match=r"exists and is not a regular file.*two"):
        save_models(models)
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


RACED = """
import sys
from pathlib import Path
from nsq_ref import Scheme
from onnx_export.operators import quantize_model, save_models

one, two = Path(sys.argv[1], "one"), Path(sys.argv[1], "two")

def put_a_folder_in_the_way(event, arguments):
    if event == "os.rename" and str(arguments[1]) == str(two):
        two.mkdir()

sys.addaudithook(put_a_folder_in_the_way)
try:
    save_models({one: quantize_model(Scheme()), two: quantize_model(Scheme())})
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_second_model_that_cannot_be_moved_undoes_the_first(
    old: bytes | None, tmp_path: Path
) -> None:
    """The file system refuses when the first is in its place already."""
    if old is not None:
        (tmp_path / "one").write_bytes(old)
    command = [sys.executable, "-c", RACED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "two").rmdir()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])
    assert done.stdout == f"[Errno 21] Is a directory: '{tmp_path / 'two'}'\n"


# --- the command --------------------------------------------------------------------------------


def test_written_models_conform(tmp_path: Path) -> None:
    """I1 K1 P1. As users write and check them, with sinks of the dtype that was chosen."""
    options = ("streaming3", "--set", "scale_dtype=bfloat16")
    done = nsq("onnx", "codec", *options, "-o", "new/models", "--dtype", "bfloat16", cwd=tmp_path)
    assert done.stdout.splitlines() == ["new/models/encode.onnx", "new/models/decode.onnx"]
    models = "new/models/encode.onnx", "--decode", "new/models/decode.onnx"
    asked = "--scheme", *options, "--dtype", "bfloat16"
    assert "CONFORMS SO FAR to streaming3" in nsq("check", *models, *asked, cwd=tmp_path).stdout


def test_models_are_only_replaced_by_force(tmp_path: Path) -> None:
    """What is there stays, unless it is to go."""
    written = json.loads(nsq("onnx", "codec", "-o", ".", "--json", cwd=tmp_path).stdout)
    assert Scheme.from_dict(written["scheme"]) == Scheme()
    assert {name: written[name] for name in ("dtype", "encode", "decode")} == {
        "dtype": "float32", "encode": "encode.onnx", "decode": "decode.onnx",
    }  # fmt: skip
    command = "onnx", "codec", "naive4", "-o", "."
    assert "encode.onnx exists; choose another folder" in refused(*command, cwd=tmp_path)
    nsq(*command, "--force", "--rank", 3, cwd=tmp_path)
    model = onnx.load(tmp_path / "encode.onnx")
    assert len(model.graph.input[0].type.tensor_type.shape.dim) == 3
    assert '"axis": "token"' in {one.key: one.value for one in model.metadata_props}["nsq.scheme"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nsep+KIVI"], "nsep+KIVI is a pair for keys and values; name one of its schemes"),
        (["nsep5"], "unknown scheme name 'nsep5'"),
        (["--set", "bits=5"], "bits=5 is not supported"),
        (["--rank", "1"], "rank=1 is too small"),
    ],
)
def test_bad_use_of_the_command(tmp_path: Path, options: list[str], says: str) -> None:
    """One line, and nothing is written."""
    assert says in refused("onnx", "codec", *options, "-o", "models", cwd=tmp_path)
    assert not (tmp_path / "models").exists()


def test_the_command_without_onnx(tmp_path: Path) -> None:
    """It says what to install."""
    code = (
        "import sys; sys.modules['onnx'] = None; sys.argv = ['nsq', 'onnx', 'codec', '-o', '.']; "
        "from nsq_ref.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nsq: nsq onnx needs onnx; pip install 'nsq-ref[onnx]'")
