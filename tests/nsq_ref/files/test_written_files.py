"""Every file that the project writes: whole or not at all, with the mode the umask asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsq_ref import files, quantize

HERE = Path(__file__).parents[2]
DRIVER = HERE / "support" / "writers.py"
PORT = f"{HERE / 'ports' / 'functions.py'}:encode"
OF_ONE_FILE = ["quantize", "dequantize", "cache", "check", "archive", "zip", "gguf"]
OF_MANY = ["demo", "codec", "vectors", "questions", "graph"]
WRITERS = OF_ONE_FILE + OF_MANY
FULL = [one for one in WRITERS if one != "gguf"]


def drive(folder: Path, task: str, *arguments: object) -> Any:
    """Run a task of ``writers.py`` in a process of its own."""
    command = [sys.executable, str(DRIVER), task, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def prepared(folder: Path) -> Path:
    random = np.random.default_rng(0)
    keys = random.standard_normal((2, 40, 8), dtype=np.float32)
    np.savez(folder / "kv.npz", keys=keys, values=keys[..., ::-1])
    files.save(folder / "codes.safetensors", {"keys": quantize(keys, backend="numpy")})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepared(tmp_path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What came of a task, by writer."""

    @cache
    def of(task: str, *writers: str) -> Any:
        return drive(prepared(tmp_path_factory.mktemp(task)), "each", task, *writers)

    return of


def test_new_files_have_the_mode_of_the_umask(folder: Path) -> None:
    umasks = ["0o022", "0o077", "0o002"]
    found = drive(folder, "new", *umasks)
    assert list(found) == umasks
    for umask, writers in found.items():
        assert list(writers) == WRITERS
        for writer, modes in writers.items():
            assert len(modes) == 1 if writer in OF_ONE_FILE else len(modes) > 1, writer
            assert set(modes.values()) == {0o666 & ~int(umask, 8)}, (writer, umask)


def test_files_that_are_replaced_keep_their_mode(folder: Path) -> None:
    found = drive(folder, "replaced", "0o644", "0o600", "0o444")
    assert list(found) == WRITERS
    for writer, (before, after) in found.items():
        assert after == before, writer
    assert {mode for before, _ in found.values() for mode in before.values()} == {
        0o644, 0o600, 0o444,
    }  # fmt: skip


@pytest.mark.parametrize("writer", FULL)
def test_a_full_disk_leaves_what_was_there_and_names_the_file(
    writer: str, outcomes: Callable[..., Any]
) -> None:
    """No room for a byte, and for all but one byte; with and without files to replace.

    The writer of GGUF files does not say that a disk is full: only tests and examples use it.
    """
    for outcome in outcomes("full", *FULL)[writer]:
        assert outcome["changed"] == [], outcome
        assert outcome["errno"] == "EFBIG", outcome
        assert ".tmp" not in outcome["message"], outcome
        assert any(outcome["message"].count(name) for name in outcome["files"]), outcome


@pytest.mark.parametrize("writer", OF_ONE_FILE)
def test_links_keep_pointing_where_they_did(writer: str, outcomes: Callable[..., Any]) -> None:
    (outcome,) = outcomes("linked", *OF_ONE_FILE)[writer]
    assert outcome == {"link": True, "changed": True, "mode": 0o640}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_be_replaced_is_refused_before_the_work(
    writer: str, outcomes: Callable[..., Any]
) -> None:
    """A folder, a pipe or a device where the file shall be; a folder that cannot be written to."""
    for outcome in outcomes("refused", *WRITERS)[writer]:
        assert outcome["changed"] == [], outcome
        assert outcome["says"] in outcome["message"], outcome
        assert ".tmp" not in outcome["message"], outcome
        assert outcome["printed"] == "", outcome


def test_output_that_goes_to_the_file_itself_is_refused(folder: Path) -> None:
    """Replaced, the file would lose what the process prints."""
    nsq = Path(sys.executable).with_name("nsq")
    shown = folder / "shown"
    for name in ("/dev/stdout", "shown"):
        command = [nsq, "check", PORT, "--junit", name]
        with shown.open("wb") as stream:
            done = subprocess.run(
                command, cwd=folder, stdout=stream, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 2
        assert f"{name}: " in done.stderr
        assert shown.read_bytes() == b""
    done = subprocess.run(
        [*command[:-1], "/dev/stdout"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "/dev/stdout: exists and is not a regular file" in done.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_what_is_printed_to_a_full_disk_is_an_error(options: tuple[str, ...]) -> None:
    nsq = Path(sys.executable).with_name("nsq")
    for unbuffered in ("", "1"):  # then it is known at the end, or at once
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [nsq, "info", *options],
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert (done.returncode, done.stderr) == (2, "nsq: No space left on device\n")


# --- functions ----------------------------------------------------------------------------------


LIMITED = """
import resource, sys
import numpy as np
from nsq_ref import Scheme, quantize, files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
x = np.ones((64, 64), np.float32)
try:
    if sys.argv[2] == "save":
        files.save(sys.argv[1], {"k": quantize(x, backend="numpy")})
    else:
        files.write_arrays(sys.argv[1], {"k": x})
except OSError as error:
    sys.exit(f"OSError: {error}")
"""


@pytest.mark.parametrize("function", ["save", "write_arrays"])
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_write_that_fails_changes_nothing(function, before, tmp_path):
    path = tmp_path / "cache.safetensors"
    if before is not None:
        path.write_bytes(before)
    command = [sys.executable, "-c", LIMITED, str(path), function]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "OSError" in done.stderr
    assert str(path) in done.stderr
    assert "File too large" in done.stderr
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_errors_of_the_file_system_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    arrays = {"k": np.ones((2, 2), np.float32)}
    for path, error in (
        (tmp_path / "none" / "x.safetensors", FileNotFoundError),
        (tmp_path / "file" / "x.safetensors", NotADirectoryError),
    ):
        with pytest.raises(error) as caught:
            files.write_arrays(path, arrays)
        assert caught.value.filename == str(path)
        for read in (files.load, files.read_arrays):
            with pytest.raises(error):
                read(path)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(FileExistsError, match="not a regular file"):
        files.write_arrays(folder, arrays)
    with pytest.raises(IsADirectoryError):
        files.load(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_a_link_keeps_pointing_and_a_file_is_replaced(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"old")
    os.symlink("a.safetensors", tmp_path / "b.safetensors")
    files.write_arrays(tmp_path / "b.safetensors", {"k": np.ones((2, 2), np.float32)})
    assert (tmp_path / "b.safetensors").is_symlink()
    assert list(files.read_arrays(tmp_path / "a.safetensors")) == ["k"]
