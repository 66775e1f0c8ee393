"""Run by test_written_files.py in processes of their own, whose umask and limits it changes.

``python writers.py TASK ARGUMENT...`` prints one line of JSON; standard output holds more before.
``python writers.py each TASK WRITER...`` runs it for each writer in a folder and a fork of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import itertools
import json
import os
import resource
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nsq_ref import KVCache, cli
from onnx_export.models.built import cached_onnx
from onnx_export.models.tiny import tiny_gguf

PORT = f"{Path(__file__).parents[1] / 'ports' / 'functions.py'}:encode"


class RefusedError(Exception):
    """The command ended with an error."""


def nsq(*arguments: object) -> Callable[[Path], None]:
    """Return what runs a command in this process; ``OUT`` stands for the path it is told."""

    def run(out: Path) -> None:
        sys.argv = ["nsq", *(str(one).replace("OUT", str(out)) for one in arguments)]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                cli.main()
        except SystemExit as end:
            if end.code:
                raise RefusedError(said.getvalue()) from end

    return run


def save_cache(out: Path) -> None:
    cache = KVCache(1, 1, 8)
    cache.append(np.ones((1, 1, 40, 8), np.float32), np.ones((1, 1, 40, 8), np.float32))
    cache.save(out)


def questions(out: Path) -> None:
    nsq("gen", "--operation", "attend", "--dtype", "float32", "--dir", "OUT")(out)


def gguf(out: Path) -> None:
    """Write a model under its own name."""
    tiny_gguf(out.parent)


def graph(out: Path) -> None:
    """Build a decoder in a cache folder, whose file is not counted as written."""
    cached_onnx(MODEL, cache_dir=out)


MODEL = Path("models/tiny.gguf")
WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "quantize": ("q.safetensors", nsq("quantize", "kv.npz", "-o", "OUT", "--backend", "numpy")),
    "dequantize": (
        "x.safetensors",
        nsq("dequantize", "codes.safetensors", "-o", "OUT", "--backend", "numpy"),
    ),
    "cache": ("cache.safetensors", save_cache),
    "check": ("report.xml", nsq("check", PORT, "--case", "encode/exact-tie/0", "--junit", "OUT")),
    "archive": ("v.tar.gz", nsq("vectors", "-o", "OUT")),
    "zip": ("v.zip", nsq("vectors", "-o", "OUT")),
    "gguf": ("tiny.gguf", gguf),
    "demo": ("demo", nsq("demo", "--keys", "kv.npz", "-o", "OUT")),
    "codec": ("models/of", nsq("onnx", "codec", "-o", "OUT", "--force")),
    "vectors": ("v", nsq("vectors", "-o", "OUT")),
    "questions": ("gen", questions),
    "graph": ("built", graph),
}
"""What each writes below the working directory, and how."""


def prepare() -> None:
    """Make what `graph` reads, before modes and limits are changed."""
    MODEL.parent.mkdir(exist_ok=True)
    tiny_gguf(MODEL.parent)


def written(name: str) -> list[Path]:
    root = Path(name)
    return [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())


def modes(name: str) -> dict[str, int]:
    return {str(file): stat.S_IMODE(file.stat().st_mode) for file in written(name)}


def snapshot() -> dict[str, str]:
    """Return all there is: folders, links and files with their content."""
    return {
        str(path): "folder" if path.is_dir() else f"{path.lstat().st_mode} {_content(path)}"
        for path in sorted(Path().rglob("*"))
    }


def _content(path: Path) -> str:
    return path.read_bytes().hex() if path.is_file() else "no file"


def summary(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(str(path) for path in before | after if before.get(path) != after.get(path))


@contextlib.contextmanager
def printed_to(stream: io.StringIO) -> Iterator[None]:
    with contextlib.redirect_stdout(stream):
        yield


def new(*umasks: str) -> dict[str, Any]:
    """Write with one umask after the other; return the modes of the files."""
    prepare()
    found: dict[str, Any] = {}
    for umask in umasks:
        os.umask(int(umask, 8))
        for one, (name, write) in WRITERS.items():
            write(Path(name))
            found.setdefault(umask, {})[one] = modes(name)
            shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    return found


def replaced(*given: str) -> dict[str, Any]:
    """Write over files of these modes in turn; return the modes before and after."""
    prepare()
    os.umask(0o022)
    turn = itertools.cycle(int(mode, 8) for mode in given)
    found = {}
    for one, (name, write) in WRITERS.items():
        write(Path(name))
        for file in written(name):
            if one == "graph":  # an intact graph is not written again
                file.write_bytes(b"damaged")
            os.chmod(file, next(turn))
        before, numbers = modes(name), {file: file.stat().st_ino for file in written(name)}
        write(Path(name))
        found[one] = [before, modes(name)]
        assert all(file.stat().st_ino != number for file, number in numbers.items()), one
    return found


def full(one: str) -> list[dict[str, Any]]:
    """Write with less and less room, into nothing and over what is there."""
    prepare()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    name, write = WRITERS[one]
    Path("elsewhere").mkdir()
    write(Path("elsewhere") / name)
    files = written(f"elsewhere/{name}")
    largest = max(file.stat().st_size for file in files)
    shutil.rmtree("elsewhere")
    outcomes = []
    for exists, room in itertools.product((False, True), (0, largest - 1)):
        if exists and not Path(name).exists():
            write(Path(name))
            for file in written(name) if one == "graph" else ():
                file.write_bytes(b"damaged")
        before = snapshot()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            write(Path(name))
            message, number = "nothing was refused", 0
        except RefusedError as end:
            message, number = str(end), errno.EFBIG * (os.strerror(errno.EFBIG) in str(end))
        except OSError as failed:
            message, number = str(failed), failed.errno or 0
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        after = snapshot()
        changed = summary(before, after)
        outcomes.append(
            {
                "room": room,
                "changed": changed,
                "message": message,
                "errno": errno.errorcode.get(number),
                "files": [file.name for file in files],
            }
        )
    return outcomes


def linked(one: str) -> list[dict[str, Any]]:
    prepare()
    name, write = WRITERS[one]
    Path("aside").mkdir()
    aside = Path("aside/real")
    aside.write_bytes(b"what was there")
    os.chmod(aside, 0o640)
    Path(name).symlink_to(aside)
    write(Path(name))
    return [
        {
            "link": Path(name).is_symlink(),
            "changed": len(aside.read_bytes()) > 100,
            "mode": stat.S_IMODE(aside.stat().st_mode),
        }
    ]


def without_power() -> None:
    """Give up what lets root write anywhere; for anybody else there is nothing to give up."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, nothing) == 0


def refused(one: str) -> list[dict[str, Any]]:
    prepare()
    name, write = WRITERS[one]
    Path("elsewhere").mkdir()
    write(Path("elsewhere") / name)
    file = written(f"elsewhere/{name}")[-1].relative_to("elsewhere")
    shutil.rmtree("elsewhere")

    def folder() -> None:
        file.mkdir(parents=True)

    def pipe() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(file)

    def device() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to("/dev/null")

    def read_only() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(file.parent, 0o555)

    without_power()
    outcomes = []
    for make, says in (
        (folder, "exists and is not a regular file"),
        (pipe, "exists and is not a regular file"),
        (device, "exists and is not a regular file"),
        (read_only, "ermission denied"),
    ):
        make()
        before = snapshot()
        shown = io.StringIO()
        try:
            with printed_to(shown):
                write(Path(name))
            message = "nothing was refused"
        except (RefusedError, OSError) as error:
            message = str(error)
        outcomes.append(
            {
                "changed": summary(before, snapshot()),
                "message": message,
                "says": says,
                "printed": shown.getvalue(),
                "how": make.__name__,
            }
        )
        if make is read_only:
            os.chmod(file.parent, 0o755)
        elif file.is_dir():
            file.rmdir()
        else:
            file.unlink()
    return outcomes


def each(task: str, *names: str) -> dict[str, Any]:
    """Start once, as what is imported takes longer than what is written."""
    files = [path for path in Path().iterdir() if path.is_file()]
    found = {}
    for one in names:
        folder = Path(one)
        folder.mkdir()
        for file in files:
            shutil.copy(file, folder)
        if not (child := os.fork()):
            try:
                os.chdir(folder)
                Path("../result.json").write_text(json.dumps(globals()[task](one)))
            except BaseException:  # noqa: BLE001 - the child ends here
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{task} {one} failed")
        found[one] = json.loads(Path("result.json").read_text())
    return found


if __name__ == "__main__":
    result = globals()[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(result))
