"""Questions and answers in files, one a case."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nsq_ref.conformance.operations import Answer, Case, Failure, Port
from nsq_ref.conformance.ports.frames import Frame, FrameError, read_frame, write_frame
from nsq_ref.conformance.ports.messages import answer_of, request_of
from nsq_ref.files import atomic

HEADER_FILE = "header.nsq"


def _file_name(number: int) -> str:
    return f"{number:05d}.nsq"


def write_files(directory: str | Path, header: Frame, cases: Iterable[Case]) -> None:
    """Write the frames of a run as files: ``header.nsq`` and ``00000.nsq`` onwards, all or none.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> from nsq_ref import Scheme
    >>> from nsq_ref.conformance.ports.messages import hello_frame
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_files(directory, hello_frame(), [case, case])
    ...     print(sorted(os.listdir(directory)))
    ['00000.nsq', '00001.nsq', 'header.nsq']
    """
    folder = Path(directory)

    def files() -> Iterator[tuple[Path, bytes]]:
        yield folder / HEADER_FILE, _as_bytes(header)
        for number, case in enumerate(cases):
            yield folder / _file_name(number), _as_bytes(request_of(number, case))

    atomic.write(files(), make_folders=True)


def _as_bytes(frame: Frame) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, frame)
    return stream.getvalue()


class Folder(Port):
    """Answers that lie in a directory, each as a file with the name of its request.

    Nothing changes one, so that threads may share it. ValueError where there is no such directory.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from nsq_ref import Scheme
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     Folder("mine", directory).ask(7, case)
    Failure(kind='missing', message='there is no 00007.nsq')
    """

    def __init__(self, name: str, directory: str | Path) -> None:
        self.name = name
        self._directory = Path(directory)
        if not self._directory.is_dir():
            raise ValueError(f"there is no directory {directory}")

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Read the answer to a case."""
        path = self._directory / _file_name(number)
        if path.exists() and not path.is_file():  # a named pipe would be waited for
            return Failure("garbage", f"{path.name} cannot be read: it is no file")
        try:
            with path.open("rb") as file:
                frame = read_frame(file)
                behind = file.read(1)
        except FileNotFoundError:
            return Failure("missing", f"there is no {path.name}")
        except (FrameError, OSError) as error:
            return Failure("garbage", f"{path.name} cannot be read: {error}")
        if frame is None or behind:
            reason = "is empty" if frame is None else "goes on behind its first frame"
            return Failure("garbage", f"{path.name} {reason}; it should hold one frame")
        return answer_of(frame, number)

    def beyond(self, cases: int) -> list[str]:
        """Return the names of answers to no case of a run of so many.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     (Path(directory) / "00007.nsq").touch()
        ...     Folder("mine", directory).beyond(7)
        ['00007.nsq']
        """
        numbers = {path.name: path.stem for path in self._directory.glob("*.nsq")}
        return sorted(name for name, stem in numbers.items()
                      if re.fullmatch("[0-9]{5,9}", stem) and int(stem) >= cases)  # fmt: skip
