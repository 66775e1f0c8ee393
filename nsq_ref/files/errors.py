"""What is wrong with a file, in the words that every reader uses."""

from __future__ import annotations

DAMAGED = "the file was cut short or damaged, or is something else; copy it again or make it anew"


class StorageError(ValueError):
    """A file that is damaged, of another format or version, or holds what no encoder writes."""


def require_name(name: object) -> None:
    """Refuse names of arrays that no file shall hold."""
    if not isinstance(name, str):
        raise TypeError(f"array names are strings, got {name!r}")
    if not name or not name.isprintable() or name == "__metadata__":
        raise ValueError(f"array name {name!r} must be printable text, not '__metadata__'")
