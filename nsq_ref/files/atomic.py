"""Files that are written whole or not at all.

New content is written beside its place and moved there once all of it is on disk. Several files
that belong together are moved only when all are complete, and a move that fails undoes the others.
What was to be written appears under no other name: whatever fails, no temporary file stays.

A file that is replaced keeps its permissions; a new one has those that the umask leaves, as if
``open`` had made it. Owner, group and access lists are those of any new file of this process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

PathLike = str | os.PathLike[str]

Content: TypeAlias = bytes | Callable[[Path], object]
"""The bytes of a file, or a function that writes them to the path it is given."""

PERMISSIONS = 0o777
OURS = stat.S_IRUSR | stat.S_IWUSR  # while a file is being written, whatever it shall have then


def write(files: Iterable[tuple[PathLike, Content]], *, make_folders: bool = False) -> None:
    """Write files, all of them or none.

    Parameters
    ----------
    files : iterable of (path, content)
        Content is bytes, or a function that writes the file at the path it is given, in its turn.
        A link keeps pointing where it did: what it points at is replaced.
    make_folders : bool
        Make the folders that are missing; they are removed again if the writing fails.

    Raises
    ------
    OSError
        Where a file cannot be written: it names the file, and everything is as it was. Also for
        folders, pipes and devices, and for a file that this process prints to.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> one, two = Path(folder.name, "one"), Path(folder.name, "new", "two")
    >>> write([(one, b"1"), (two, lambda path: path.write_bytes(b"2"))], make_folders=True)
    >>> one.read_bytes(), two.read_bytes()
    (b'1', b'2')
    >>> write([(one, b"3"), (folder.name, b"4")])
    Traceback (most recent call last):
    FileExistsError: [Errno 17] exists and is not a regular file; choose another name: '...'
    >>> one.read_bytes()
    b'1'
    >>> folder.cleanup()
    """
    # Each stack undoes what it was told, the last first, whichever way it is left.
    with contextlib.ExitStack() as leftovers, contextlib.ExitStack() as moves:
        written = []
        for path, content in files:
            one = _File(path)
            if make_folders:
                _make_folders(one.target.parent, leftovers)
            leftovers.callback(one.discard)
            one.fill(content)
            written.append(one)
        for one in written:  # when all are written, as a disk syncs many at a time
            one.sync()
        for one in written:
            moves.callback(one.put_back)
            one.move(keep_old=len(written) > 1)
        moves.pop_all()  # from here on the new files stay
        for folder in {one.target.parent for one in written}:
            _sync_folder(folder)


def require_writable(*paths: PathLike, make_folders: bool = False) -> None:
    """Refuse at once what `write` would refuse after the work that makes the content.

    That is where there is something else than a regular file, or no folder that can be written to.

    Examples
    --------
    >>> require_writable("no such folder/file")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] there is no folder no such folder; make it first: '...'
    """
    for path in paths:
        name = os.fspath(path)
        folder = _File(path).target.parent
        while make_folders and not os.path.lexists(folder):
            folder = folder.parent
        if not folder.exists():
            raise FileNotFoundError(
                errno.ENOENT, f"there is no folder {Path(path).parent}; make it first", name
            )
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a folder", name)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"permission denied to write in {folder}", name)


class _File:
    """A file on its way: ``path`` as it was named, ``target`` behind its links."""

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        self.mode = _permissions(path)
        self.target = Path(os.path.realpath(path))
        self.temporary = self._beside()
        self.old: Path | None = None  # where what is replaced is kept until all is done
        self.new: os.stat_result | None = None
        self.usual = 0o600  # the mode of a new file, once it is known

    def _beside(self) -> Path:
        return self.target.with_name(f".{secrets.token_hex(8)}.tmp")

    def fill(self, content: Content) -> None:
        """Write the new file, which is not in its place yet."""
        # What is private is private from its first byte.
        mode = 0o666 if self.mode is None else self.mode | OURS
        with self._errors_named():
            with open(self.temporary, "xb", opener=functools.partial(os.open, mode=mode)) as file:
                if isinstance(content, bytes):
                    file.write(content)
                self.usual = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if self.usual & OURS != OURS:
                os.chmod(self.temporary, self.usual | OURS)
            if not isinstance(content, bytes):
                content(self.temporary)

    def sync(self) -> None:
        """Wait until the new file is on disk, and set its permissions."""
        with self._errors_named():
            with open(self.temporary, "rb+") as file:
                os.fsync(file.fileno())
                self.new = os.fstat(file.fileno())
            # Some writers make the file anew, with a mode of their own.
            wanted = self.usual if self.mode is None else self.mode
            if stat.S_IMODE(self.new.st_mode) != wanted:
                os.chmod(self.temporary, wanted)

    def move(self, *, keep_old: bool) -> None:
        """Put the new file in its place."""
        with self._errors_named():
            self.mode = _permissions(self.path)  # it may have come meanwhile, or gone
            if self.mode is not None and keep_old:
                self.old = self._beside()
                try:
                    os.link(self.target, self.old)
                except OSError:  # not every file system has links
                    os.replace(self.target, self.old)
            os.replace(self.temporary, self.target)

    def put_back(self) -> None:
        """Undo `move`, however far it came."""
        old, self.old = self.old, None  # whatever happens now, what was there is not discarded
        if old is not None and os.path.lexists(old):
            os.replace(old, self.target)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(old)  # replacing a file by itself leaves both names
        elif self.mode is None and self.new is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(self.target), self.new):
                    os.unlink(self.target)

    def discard(self) -> None:
        """Remove what is left beside the target."""
        try:
            _remove(os.unlink, self.temporary)
        finally:
            if self.old is not None:
                _remove(os.unlink, self.old)

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Name the file in errors about it: the user knows of no other."""
        try:
            yield
        except OSError as error:
            ours = {None, *map(str, (self.temporary, self.target, self.old))}
            name = None if error.filename is None else os.fspath(error.filename)
            if error.errno is None or name not in ours:
                raise
            raise OSError(error.errno, error.strerror, self.path) from None


def _permissions(path: PathLike) -> int | None:
    """Return those of a regular file, None where there is none, and refuse anything else."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise FileExistsError(
            errno.EEXIST, "exists and is not a regular file; choose another name", os.fspath(path)
        )
    if any(_goes_to(stream, found) for stream in (1, 2)):
        raise FileExistsError(
            errno.EEXIST, "is where the output goes; choose another name", os.fspath(path)
        )
    return stat.S_IMODE(found.st_mode) & PERMISSIONS


def _goes_to(stream: int, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(file, os.fstat(stream))
    except OSError:  # the stream is closed
        return False


def _make_folders(folder: Path, leftovers: contextlib.ExitStack) -> None:
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        leftovers.callback(_remove, os.rmdir, one)  # which a folder that holds files survives
        one.mkdir(exist_ok=True)


def _remove(remove: Callable[[Path], None], path: Path) -> None:
    """Remove what may be there, even if an interruption comes just now."""
    try:
        remove(path)
    except OSError:
        pass
    except BaseException:
        with contextlib.suppress(OSError):
            remove(path)
        raise


def _sync_folder(folder: Path) -> None:
    """Ask that the names in a folder reach the disk."""
    with contextlib.suppress(OSError):  # not every system opens folders
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
