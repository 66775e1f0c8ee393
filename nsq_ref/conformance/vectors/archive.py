"""The shipped vectors as an archive or a folder, for those who check without Python."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from nsq_ref.conformance.vectors.reading import FOLDER, FORMAT_VERSION
from nsq_ref.files import atomic

HEADER = Path(__file__).parents[1] / "nsq.h"
ARCHIVE_FOLDER = f"nsq-vectors-v{FORMAT_VERSION}"


def export(path: str | Path) -> None:
    """Write the shipped vectors, their schema and ``nsq.h`` to where no Python is needed.

    Parameters
    ----------
    path : str or path
        A name that ends in ``.tar.gz`` or ``.zip`` is an archive, always of the same bytes; any
        other is a directory.

    Raises
    ------
    ValueError
        For the ending of an archive of another kind.
    OSError
        Where it cannot be written; nothing is left then.

    Examples
    --------
    >>> import tempfile, zipfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(Path(folder) / "vectors.zip")
    ...     with zipfile.ZipFile(Path(folder) / "vectors.zip") as archive:
    ...         print(archive.namelist()[0])
    nsq-vectors-v1/README.md
    """
    target = Path(path)
    shipped = [*FOLDER.iterdir(), HEADER]
    contents = {file.name: file.read_bytes() for file in sorted(shipped, key=lambda one: one.name)}
    if target.name.endswith(".tar.gz"):
        atomic.write([(target, _tar(contents))])
    elif target.suffix == ".zip":
        atomic.write([(target, _zip(contents))])
    elif target.suffix in (".7z", ".bz2", ".gz", ".tar", ".tgz", ".xz", ".zst"):
        raise ValueError(f"{path} is no name for a folder; archives end in .tar.gz or .zip")
    else:
        files = ((target / name, data) for name, data in contents.items())
        atomic.write(files, make_folders=True)


def _tar(contents: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, data in contents.items():
            member = tarfile.TarInfo(f"{ARCHIVE_FOLDER}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def _zip(contents: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            member = zipfile.ZipInfo(f"{ARCHIVE_FOLDER}/{name}")  # its date is that of 1980
            member.create_system = 3
            member.external_attr = 0o644 << 16
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)
    return packed.getvalue()
