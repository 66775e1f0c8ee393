"""Files written whole or not at all: by the real file system, stopped at every step."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsq_ref.files import atomic


def files(folder: Path) -> dict[str, Any]:
    """Return all there is below a folder: contents, modes, links."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None,
            stat.S_IMODE(path.lstat().st_mode),
        )
        for path in sorted(folder.rglob("*"))
    }


CONTENTS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "in/a", "in/deep/c"]), st.binary(max_size=40)),
    min_size=1, max_size=4, unique_by=lambda one: one[0],
)  # fmt: skip
MODES = st.sampled_from([0o644, 0o600, 0o444, 0o640, 0o777, 0o400, 0o666])


@given(CONTENTS, CONTENTS, MODES, st.booleans())
def test_what_is_written_is_there_and_nothing_else(
    before: list[tuple[str, bytes]], new: list[tuple[str, bytes]], mode: int, by_path: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in before:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
            (folder / file).chmod(mode)

        def anew(content: bytes) -> atomic.Content:
            def make(path: Path) -> None:
                path.unlink()  # as safetensors does, which writes beside it and renames
                path.write_bytes(content)
                path.chmod(0o600)

            return make if by_path else content

        atomic.write([(folder / file, anew(content)) for file, content in new], make_folders=True)
        found = {name: one for name, one in files(folder).items() if one[0] is not None}
        probe = folder / "probe"
        probe.touch()
        expected = {file: (content, mode) for file, content in before}
        for file, content in new:
            kept = mode if file in expected else stat.S_IMODE(probe.stat().st_mode)
            expected[file] = content, kept
        assert found == expected


UMASKS = """
import os, sys
from pathlib import Path
from nsq_ref.files import atomic

one, two, probe = (Path(sys.argv[1], name) for name in ("one", "two", "probe"))
for umask in range(0, 0o1000, 7):
    os.umask(umask)
    atomic.write([(one, b"1"), (two, lambda path: path.write_bytes(b"2"))])
    probe.touch()
    assert one.stat().st_mode == two.stat().st_mode == probe.stat().st_mode, oct(umask)
    assert os.umask(umask) == umask
    for path in (one, two, probe):
        path.unlink()
"""


def test_new_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    """As ``open`` would have made them, and the umask, which is the process's, is left alone."""
    subprocess.run([sys.executable, "-c", UMASKS, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []
    assert "os.umask" not in Path(atomic.__file__).read_text(encoding="utf-8")


STOPPED = """
import errno, json, os, sys
from pathlib import Path
from nsq_ref.files import atomic

root, how, old, count = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
stopped = {"open", "os.rename", "os.link", "os.mkdir"}
if how == "interrupt":
    stopped |= {"os.chmod", "os.remove", "os.rmdir"}

def run(step):
    "Write in a process of its own, as a hook stays for ever; return how many steps it took."
    folder = root / str(step)
    folder.mkdir()
    for name in old:
        (folder / name).write_text("old " + name)
    seen = 0

    def stop(event, arguments):
        nonlocal seen
        if event in stopped and any(str(folder) in str(one) for one in arguments):
            seen += 1
            if seen - 1 == step:
                if how == "interrupt":
                    raise KeyboardInterrupt
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])

    contents = [
        (folder / "a", b"new a"),
        (folder / "new" / "b", lambda path: path.write_bytes(b"new new/b")),
        (folder / "c", b"new c"),
    ]
    sys.addaudithook(stop)
    try:
        atomic.write(contents[:count], make_folders=True)
        said = ""
    except KeyboardInterrupt:
        said = "interrupted"
    except OSError as error:
        said = str(error)
    print(json.dumps([seen, said]), flush=True)
    return seen

step, steps = 0, 1
while step <= steps:  # the last run is not stopped
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        steps = int((root / "steps").read_text())
    else:
        (root / "steps").write_text(str(run(step)))
        os._exit(0)
    step += 1
"""


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("old", [[], ["a"], ["a", "c"]], ids=["none", "a", "a and c"])
@pytest.mark.parametrize("how", ["interrupt", "full"])
def test_stopped_at_any_step_all_are_new_or_all_are_old(
    how: str, old: list[str], count: int, tmp_path: Path
) -> None:
    """Every call to the file system in turn is interrupted, or finds the disk full."""
    new = dict([("a", b"new a"), ("new/b", b"new new/b"), ("c", b"new c")][:count])
    before = {name: f"old {name}".encode() for name in old}
    command = [sys.executable, "-c", STOPPED, str(tmp_path), how, json.dumps(old), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    outcomes = []
    for step, (_, said) in enumerate(map(json.loads, done.stdout.splitlines())):
        found = files(tmp_path / str(step))
        contents = {name: one[0] for name, one in found.items() if one[0] is not None}
        assert contents in (before, before | new), (step, said)
        if contents == before:
            assert found.keys() == before.keys(), f"step {step}: a folder was left"
            assert said, "nothing was written, and nothing said"
        elif how == "full":
            assert said == "", "all was written, and an error said"
        assert ".tmp" not in said
        outcomes.append(contents == before)
    if how == "interrupt":
        assert outcomes == sorted(outcomes, reverse=True), "all becomes new at one moment"
    elif old and count > 1:
        assert outcomes != sorted(outcomes, reverse=True), "without links it must work as well"
    assert outcomes.count(True) >= (8 if count > 1 else 3)
    assert False in outcomes


RACED = """
import os, sys
from pathlib import Path
from nsq_ref.files import atomic

one, two = Path(sys.argv[1], "one"), Path(sys.argv[1], "two")
moves = []

def put_a_folder_in_the_way(event, arguments):
    if event == "os.rename" and str(arguments[1]) == str(two):
        two.mkdir()

sys.addaudithook(put_a_folder_in_the_way)
try:
    atomic.write([(one, b"new"), (two, b"new")])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_move_that_fails_undoes_the_moves_before_it(old: bytes | None, tmp_path: Path) -> None:
    if old is not None:
        (tmp_path / "one").write_bytes(old)
    command = [sys.executable, "-c", RACED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"[Errno 21] Is a directory: '{tmp_path / 'two'}'\n"
    (tmp_path / "two").rmdir()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_who_reads_meanwhile_sees_the_old_or_the_new(tmp_path: Path) -> None:
    """Also of several files, each is there at every moment."""
    paths = [tmp_path / "one", tmp_path / "two"]
    atomic.write([(path, b"0" * 100) for path in paths])
    seen, ended = set(), threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.update(path.read_bytes() for path in paths)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for digit in b"123456789" * 10:
            atomic.write([(path, bytes([digit]) * 100) for path in paths])
    finally:
        ended.set()
        reader.join()
    assert seen <= {bytes([digit]) * 100 for digit in b"0123456789"}


def test_content_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """Errors that are not about the file stay what they are."""

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise errors.pop()

    errors: list[BaseException] = [
        ValueError("no"), KeyboardInterrupt(), ConnectionError("no network"), SystemExit(3),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "another file"),
    ]  # fmt: skip
    while errors:
        expected = errors[-1]
        with pytest.raises(type(expected)) as caught:
            atomic.write([(tmp_path / "a", b"1"), (tmp_path / "x/b", fail)], make_folders=True)
        assert caught.value is expected
        assert list(tmp_path.iterdir()) == []


def test_links(tmp_path: Path) -> None:
    """A link to a file, a link to a link in another folder, and one to nothing yet."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "real").write_bytes(b"old")
    (tmp_path / "in" / "first").symlink_to("real")
    (tmp_path / "second").symlink_to("in/first")
    (tmp_path / "dangling").symlink_to("in/none")
    for name, target in (("second", "real"), ("dangling", "none")):
        atomic.write([(tmp_path / name, b"new")])
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "in" / target).read_bytes() == b"new"
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["first", "none", "real"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        atomic.write([(tmp_path / "loop", b"new")])


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "file").touch()
    before = files(tmp_path)
    for name in ("folder", "pipe", "device"):
        for refuse in (atomic.require_writable, lambda path: atomic.write([(path, b"x")])):
            with pytest.raises(FileExistsError, match="not a regular file") as caught:
                refuse(tmp_path / name)
            assert caught.value.filename == str(tmp_path / name)
    for path, kind in (
        (tmp_path / "none" / "x", FileNotFoundError),
        (tmp_path / "file" / "x", NotADirectoryError),
    ):
        for refuse in (atomic.require_writable, lambda path: atomic.write([(path, b"x")])):
            with pytest.raises(kind):
                refuse(path)
    with pytest.raises(NotADirectoryError):
        atomic.require_writable(tmp_path / "file" / "new" / "x", make_folders=True)
    atomic.require_writable(tmp_path / "new" / "x", tmp_path / "file", make_folders=True)
    assert files(tmp_path) == before


def test_no_files_and_the_same_file_twice(tmp_path: Path) -> None:
    atomic.write([])
    atomic.write([(tmp_path / "a", b"1"), (tmp_path / "a", b"2")])
    assert files(tmp_path).keys() == {"a"}
    assert (tmp_path / "a").read_bytes() == b"2"
