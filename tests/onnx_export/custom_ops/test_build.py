"""Building the native library: where it cannot be, the rest is installed, and it is said."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import onnxruntime
import pytest

from onnx_export import custom_ops

SOURCES = Path(__file__).parents[3] / "onnx_export" / "custom_ops"
TOOLS = ("sh", "env", "uname", "make", "rm", "cat", "sed", "grep")


class Machine:
    """A machine with make, and with the C++ compiler that it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = SOURCES
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))

    def give_compiler(self, *lines: str) -> None:
        compiler = self.bin / "c++"
        tools = f"PATH={shlex.quote(os.environ['PATH'])}"  # its assembler and linker
        compiler.write_text("\n".join(["#!/bin/sh", tools, *lines, 'exec c++ "$@"\n']))
        compiler.chmod(0o755)

    def cmake(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        program = Path(sysconfig.get_path("scripts")) / "cmake"
        environment = {"PATH": str(self.bin), "CXX": "", **variables}
        return subprocess.run(
            [sys.executable, str(program), *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def configure(self, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        arguments = ["-S", str(self.sources), "-B", "build", "-G", "Unix Makefiles", *options]
        return self.cmake(*arguments, **variables)

    def installed(self) -> set[str]:
        done = self.cmake("--install", "build", "--prefix", "site")
        assert done.returncode == 0, done.stderr
        return {path.name for path in self.folder.glob("site/onnx_export/custom_ops/*")}

    @property
    def note(self) -> str:
        return (self.folder / "site/onnx_export/custom_ops/without_library.txt").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


TOO_OLD = 'case "$*" in *%s*) exit 1;; esac'
UNFIT = {
    "no C++ compiler was found that works": None,
    "is neither GCC nor Clang": 'set -- -U__GNUC__ -U__clang__ -U__GNUG__ "$@"',
    "is too old": TOO_OLD % "-std=c++17",
}


@pytest.mark.parametrize("reason", UNFIT)
def test_the_rest_is_installed_without_it(
    reason: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if line := UNFIT[reason]:
        machine.give_compiler(line)
    done = machine.configure()
    assert done.returncode == 0, done.stderr
    assert machine.installed() == {"without_library.txt"}
    assert reason in machine.note
    monkeypatch.delenv("NSQ_CUSTOM_OPS", raising=False)
    monkeypatch.setattr(
        custom_ops, "__path__", [str(machine.folder / "site/onnx_export/custom_ops")]
    )
    with pytest.raises(FileNotFoundError, match=reason.replace("+", r"\+")) as caught:
        custom_ops.library_path()
    assert "pip install --force-reinstall" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="compiler"):
        custom_ops.register(onnxruntime.SessionOptions())


@pytest.mark.parametrize("option", ["NSQ_REQUIRE_LIBRARY=ON", "NSQ_SANITIZE=address"])
def test_who_needs_it_is_told_at_once(option: str, machine: Machine) -> None:
    done = machine.configure(f"-D{option}")
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr


def test_a_compiler_that_was_named_must_work(machine: Machine) -> None:
    done = machine.configure(CXX="no-such-compiler")
    assert done.returncode != 0
    assert "CXX=no-such-compiler does not compile" in done.stderr


def test_a_compiler_that_comes_later_is_found(machine: Machine) -> None:
    assert machine.configure().returncode == 0
    machine.give_compiler()
    assert "NSQ_NEW_ENOUGH - Success" in machine.configure().stdout


def test_an_error_in_the_sources_is_an_error(machine: Machine) -> None:
    machine.give_compiler()
    machine.sources = machine.folder / "sources"
    shutil.copytree(SOURCES, machine.sources)
    (machine.sources / "runtime" / "library.cpp").write_text("this is no C++\n")
    assert machine.configure().returncode == 0
    done = machine.cmake("--build", "build")
    assert done.returncode != 0
    assert "library.cpp" in done.stderr
