"""The vectors: what a port must answer, written by the oracle, for readers in any language.

`docs/vectors.md` describes the files. ``python -m nsq_ref.conformance.vectors`` writes them anew.
"""

from nsq_ref.conformance.vectors.archive import export
from nsq_ref.conformance.vectors.reading import FOLDER, Vector, load, names
from nsq_ref.conformance.vectors.writing import SCHEMES, content, files, manifest, write

__all__ = [
    "FOLDER", "SCHEMES", "Vector", "content", "export", "files", "load", "manifest", "names",
    "write",
]  # fmt: skip
