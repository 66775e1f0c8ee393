"""Where people run it: no folder to write to, no home, forks, threads at the end of a process."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nsq_ref

ROOT = Path(nsq_ref.__file__).parent
CAPABILITY_TO_WRITE_EVERYWHERE, DROP_CAPABILITY = 1, 24  # CAP_DAC_OVERRIDE, PR_CAPBSET_DROP

# What is kept does not depend on the kernel, so that it is mostly one which is compiled at once.
TINY = """
from functools import partial
from nsq_ref.kernels.compilation import compiled

@partial(compiled, keep=True)
def double(x):
    return 2 * x
"""
USE = """
from nsq_ref.kernels.tiny import double
assert double(2) == 4
"""
SHOW_KEPT = """
print(sum(double.stats.cache_hits.values()), double.stats.cache_path)
"""
DECODE = """
import numpy as np, nsq_ref as nsq
x = np.random.default_rng(0).standard_normal((2, 40, 8)).astype(np.float32)
q = nsq.quantize(x, backend="numpy")
assert nsq.dequantize(q).tobytes() == nsq.dequantize(q, backend="numpy").tobytes()
"""
SHOW_KEPT_DECODING = """
from nsq_ref.kernels.codec import decode_rows
print(sum(decode_rows.stats.cache_hits.values()), decode_rows.stats.cache_path)
"""


class Place:
    """A copy of the package, run by somebody who can write only where permissions say so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "site" / "nsq_ref"
        self.kernels = self.package / "kernels"  # beside which Numba keeps what it compiled
        self.home = folder / "home"
        shutil.copytree(ROOT, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        (self.kernels / "tiny.py").write_text(TINY)
        self.home.mkdir()

    def lock(self, folder: Path, locked: bool = True) -> None:
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            path.chmod(0o555 if locked else 0o777)

    def run(self, code: str, *, check: bool = True, **variables: str | None) -> Any:
        environment: dict[str, str | None] = {
            "PATH": os.environ["PATH"], "HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join([str(self.package.parent), *site.getsitepackages()]),
            "PYTHONWARNINGS": "always", **variables,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],  # -S: nor with what is installed editable
            cwd=self.folder,
            env={name: value for name, value in environment.items() if value is not None},
            preexec_fn=obey_permissions,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done


def obey_permissions() -> None:
    """Let even root heed them, from the next program on."""
    if os.geteuid() == 0:
        result = ctypes.CDLL(None).prctl(DROP_CAPABILITY, CAPABILITY_TO_WRITE_EVERYWHERE)
        if result != 0:
            raise PermissionError("root may not drop CAP_DAC_OVERRIDE; run the tests as a user")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    made.lock(tmp_path)
    yield made
    made.lock(tmp_path, locked=False)


def notices(done: Any) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CompilationWarning:" in line]


@pytest.mark.parametrize("home", ["~", "no such folder", "home"])
def test_where_nothing_can_be_written_kernels_are_compiled_and_it_is_said_once(
    place: Place, home: str
) -> None:
    done = place.run(DECODE, HOME=home if home == "~" else str(place.folder / home))
    (notice,) = notices(done)
    assert "NUMBA_CACHE_DIR" in notice
    assert notice.startswith("<string>:5:")  # where the library was called


def test_a_user_without_a_home_gets_no_folder_named_tilde(place: Place) -> None:
    """Users of a container need not be in its list of users: then "~" stays as it is."""
    place.folder.chmod(0o777)
    place.run(USE, HOME="~")
    assert sorted(path.name for path in place.folder.iterdir()) == ["home", "site"]


def test_the_notice_can_be_turned_off(place: Place) -> None:
    ignored = (
        "import warnings, nsq_ref\nwarnings.simplefilter('ignore', nsq_ref.CompilationWarning)"
    )
    assert not place.run(ignored + USE).stderr


@pytest.mark.parametrize("folder", ["NUMBA_CACHE_DIR", "home", "package"])
def test_what_can_be_written_is_used_in_silence(place: Place, folder: str) -> None:
    variables: dict[str, str | None] = {}
    used = {"home": place.home, "package": place.kernels}.get(folder, place.folder / "cache")
    if folder == "NUMBA_CACHE_DIR":
        place.folder.chmod(0o777)
        variables[folder] = str(used)
    else:
        used.chmod(0o777)
    assert not place.run(USE, **variables).stderr
    hits, path = place.run(USE + SHOW_KEPT, **variables).stdout.split()
    assert (hits, Path(path).is_relative_to(used)) == ("1", True)


def test_a_folder_that_cannot_be_written_is_read_nonetheless(place: Place) -> None:
    """An image is filled once, and then is read-only."""
    place.kernels.chmod(0o777)
    place.run(USE)
    place.lock(place.package)
    done = place.run(USE + SHOW_KEPT)
    assert done.stdout.split() == ["1", str(place.kernels / "__pycache__")]
    assert not done.stderr


def test_numba_cache_dir_that_cannot_be_written(place: Place) -> None:
    (notice,) = notices(place.run(USE, NUMBA_CACHE_DIR="/proc/nowhere"))
    assert "NUMBA_CACHE_DIR" in notice


def test_a_folder_that_stops_being_writable(place: Place) -> None:
    """After the kernels were imported, before they are compiled; so does a full disk fail."""
    place.home.chmod(0o777)
    stop = """
import os, nsq_ref.kernels.tiny
for folder, _, _ in os.walk(os.path.expanduser("~/.cache")):
    os.chmod(folder, 0o555)
"""
    (notice,) = notices(place.run(stop + USE))
    assert "Permission denied" in notice


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limits")
def test_a_full_disk(place: Place) -> None:
    """A file-size limit is what a disk without room is to who writes: part of it is written."""
    place.home.chmod(0o777)
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    )
    (notice,) = notices(place.run(limit + USE))
    assert "too large" in notice
    assert not place.run(USE).stderr  # what was left behind is no hindrance


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "cut": lambda content: content[: len(content) // 2],
    "text": lambda content: b"garbage\n" * 9,
}


def test_damaged_files_are_replaced(place: Place) -> None:
    place.home.chmod(0o777)
    place.run(USE)
    for suffix, damage in itertools.product((".nbi", ".nbc"), DAMAGES):
        for path in place.home.rglob(f"*{suffix}"):
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
        done = place.run(USE + SHOW_KEPT)
        assert (done.stdout[0], done.stderr) == ("0", ""), (suffix, damage)
    assert place.run(USE + SHOW_KEPT).stdout.startswith("1 ")


def test_a_file_that_another_process_overwrote_is_not_taken(place: Place) -> None:
    """Two that start at once may both name their file 1, for arrays of different kinds."""
    place.home.chmod(0o777)
    frozen = DECODE.replace("assert", "q.packed.flags.writeable = False\nassert")

    def data_of(code: str) -> Path:
        place.run(code)
        (path,) = place.home.rglob("codec.decode_rows*.nbc")
        return path

    content = data_of(DECODE).read_bytes()
    for path in place.home.rglob("codec.decode_rows*"):
        path.unlink()
    path = data_of(frozen)
    assert path.read_bytes() != content
    path.write_bytes(content)
    assert place.run(frozen + SHOW_KEPT_DECODING).stdout.startswith("0 ")
    assert place.run(frozen + SHOW_KEPT_DECODING).stdout.startswith("1 ")


MODULES = [
    "nsq_ref.plots", "onnx_export.models.built", "onnx_export.models.decoder",
    "onnx_export.models.gguf", "onnx_export.models.llama", "onnx_export.models.nodes",
    "onnx_export.models.sources", "onnx_export.models.tokenizer",
    "onnx_export.operators", "onnx_export.operators.attention",
    "onnx_export.operators.attention_models", "onnx_export.operators.codec",
    "onnx_export.operators.codec_models", "onnx_export.operators.domain",
    "onnx_export.operators.nodes", "onnx_export.operators.rounding",
    "onnx_export.operators.schema", "onnx_export.models.tiny",
]  # fmt: skip


def test_what_an_extra_brings_is_named_where_it_is_missing() -> None:
    code = """
import importlib, sys
for name in ("onnx", "onnxruntime", "gguf", "tokenizers", "platformdirs", "matplotlib"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, str(error))
"""
    command = [sys.executable, "-c", code, *MODULES]
    lines = subprocess.check_output(command, text=True).splitlines()
    assert [line.split()[0] for line in lines] == MODULES
    for line in lines:
        extra = "plots" if "plots" in line else "onnx"
        assert f"pip install 'nsq-ref[{extra}]'" in line
