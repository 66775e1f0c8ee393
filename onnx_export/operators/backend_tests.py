"""The vectors of NSQ-1 as tests of ONNX backends, so that a runtime judges itself."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from nsq_ref.conformance import vectors
from nsq_ref.dtypes import Array
from nsq_ref.extras import extra
from nsq_ref.scheme import FloatName
from onnx_export.operators.codec_models import dequantize_model, quantize_model

with extra("onnx", __name__):
    import onnx
    from onnx import numpy_helper

__all__ = ["save_backend_tests"]

README = """\
# Vectors of NSQ-1, as tests of ONNX backends

Each folder is a model, of opset 21 with functions of standard operators, and data sets: inputs, and
the outputs that must come out in every bit. `data.json` has tolerances of 0 for ONNX's own loader:

    from onnx.backend.test.loader import load_model_tests
    tests = load_model_tests(PARENT_OF_THIS_FOLDER, NAME_OF_THIS_FOLDER)

The doc_string of each tensor is the id of its case. Tests of this layout have no refusals, so that
input which an encoder must refuse is left out; `nsq check` asks it.
"""
Models = dict[tuple[str, str, FloatName, int], list[tuple[str, dict[str, Array], dict[str, Array]]]]


def save_backend_tests(folder: str | os.PathLike[str]) -> int:
    """Write the vectors of encode and decode in the layout of ONNX backend tests.

    Parameters
    ----------
    folder : str or path
        Made if need be. A model is in ``test_nsq_quantize_SCHEME_DTYPE_RANKd/model.onnx``, or
        ``..._dequantize_...``, and its data sets are in ``test_data_set_0`` onwards beside it, as
        ``input_0.pb``, ``output_0.pb`` and so on, in the order of the model's inputs and outputs.

    Returns
    -------
    int
        The number of data sets.

    Raises
    ------
    ValueError
        Where there is such a folder that is not empty: a data set of another release in it would be
        taken for one of this.
    OSError
        Where it cannot be written; nothing is left then.

    Examples
    --------
    >>> import tempfile
    >>> from onnx.backend.test.loader import load_model_tests
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     number = save_backend_tests(Path(parent, "nsq"))
    ...     print(load_model_tests(parent, "nsq")[0].rtol, number > 1000)
    0 True
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"folder={str(folder)!r} is there, and not empty; name a new one")
    models = _models()
    # Thousands of small files are moved as one folder: to sync each of them takes a minute.
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        for path, content in _files(beside, models):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if target.exists():
            target.rmdir()
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return sum(map(len, models.values()))


def _models() -> Models:
    """Return the case ids, inputs and outputs of every model, by what it is exported for."""
    models: Models = {}
    for name in vectors.names():
        operation, _, scheme = name.partition("-")
        if operation not in ("encode", "decode"):
            continue
        for vector in vectors.load(name):
            given, made = dict(vector.case.inputs), dict(vector.expected)
            if vector.case.refused_by is not None:
                continue
            kept = given.get("x", given.get("sinks"))
            dtype = cast("FloatName", "float32" if kept is None else kept.dtype.name)
            rank = given["x"].ndim if operation == "encode" else len(given["shape"])
            models.setdefault((operation, scheme, dtype, rank), []).append(
                (vector.case.id, given, made)
            )
    return models


def _files(folder: Path, models: Models) -> Iterator[tuple[Path, bytes]]:
    yield folder / "README.md", README.encode()
    for (operation, name, dtype, rank), data_sets in models.items():
        scheme = vectors.SCHEMES[name]
        if operation == "encode":
            verb, model = "quantize", quantize_model(scheme, dtype, rank)
        else:
            verb, model = "dequantize", dequantize_model(scheme, dtype, rank)
        words = name.replace("+", "_").replace("-", "_")
        test = folder / f"test_nsq_{verb}_{words}_{dtype}_{rank}d"
        yield test / "model.onnx", model.SerializeToString()
        yield test / "data.json", json.dumps({"rtol": 0, "atol": 0}).encode()
        for number, (case, given, made) in enumerate(data_sets):
            where = test / f"test_data_set_{number}"
            for i, one in enumerate(model.graph.input):
                yield where / f"input_{i}.pb", _tensor(one.name, given[one.name], case)
            for i, one in enumerate(model.graph.output):
                yield where / f"output_{i}.pb", _tensor(one.name, made[one.name], case)


def _tensor(name: str, array: Array, case: str) -> bytes:
    tensor: onnx.TensorProto = numpy_helper.from_array(array, name)
    tensor.doc_string = case
    return bytes(tensor.SerializeToString())
