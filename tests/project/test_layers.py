"""Imports go one way: docs/design.md says which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {
        "renamed",
        "extras",
        "feedback",
        "dtypes",
        "dlpack",
        "environment",
        "arrays",
        "profiles",
        "scheme",
        "rounding",
        "packing",
    },
    {"spec", "kernels", "oracle"},
    {"quantized", "codec"},
    {"files", "cache", "attention", "bounds", "metrics", "rivals", "comparison", "strategies"},
    {"policy"},
    {"audit", "conformance", "plots", "transformers"},
    {"cli"},
]
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
ROOMS = sorted(
    path.stem
    for path in (ROOT / "nsq_ref").iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
)
FORBIDDEN = {  # a room to what it must never import
    "nsq_ref/oracle.py": ["nsq_ref.spec", "nsq_ref.rounding", "nsq_ref.packing", "nsq_ref.kernels"],
    "nsq_ref/spec.py": ["numba", "nsq_ref.kernels"],
    "onnx_export/operators": [
        "onnx_export.models",
        "onnx_export.evaluation",
        "onnx_export.rewrite",
        "onnx_ir",
    ],
    "onnx_export/rewrite": ["onnx_export.models", "onnx_export.evaluation"],
    "onnx_export/custom_ops": ["nsq_ref", "onnx_export.models", "onnx_export.evaluation"],
    "onnx_export/models": ["onnx_export.evaluation"],
    "onnx_export/running": ["onnx_export.models", "onnx_export.evaluation"],
}


def imports(path: Path) -> Iterator[str]:
    """All modules that a file imports, those that functions import included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports say where from"
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def files(room: str) -> list[Path]:
    path = ROOT / room
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert found, room
    return found


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "__init__"])
def test_nothing_imports_upward(room: str) -> None:
    folder = f"nsq_ref/{room}"
    for path in files(folder if (ROOT / folder).is_dir() else f"{folder}.py"):
        for name in imports(path):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "nsq_ref" and other in LAYER_OF:
                assert LAYER_OF[other] <= LAYER_OF[room], f"{path} imports {name}"
            assert package != "onnx_export" or room == "cli", f"{path} imports {name}"
            if package in ("onnx", "torch"):
                assert room in ("conformance", "transformers"), f"{path} imports {name}"


def test_every_room_has_its_layer() -> None:
    assert {*LAYER_OF, "__init__"} == set(ROOMS)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_forbidden(room: str) -> None:
    for path in files(room):
        for name in imports(path):
            for other in FORBIDDEN[room]:
                assert not f"{name}.".startswith(f"{other}."), f"{path} imports {name}"


def test_no_file_is_too_long_to_read() -> None:
    """About 500 lines; tables may be longer."""
    for package in ("nsq_ref", "onnx_export", "benchmarks"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".inc"):
                lines = len(path.read_text(encoding="utf-8").splitlines())
                assert lines <= 580, f"{path} has {lines} lines"
