"""Results on disk, a file each, written whole or not at all as they are finished."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nsq_ref.files import atomic

__all__ = ["Store"]


class Store:
    """Figures by what was measured; several processes may write to one folder.

    Threads may share one, and several processes a folder.

    Parameters
    ----------
    folder : str or os.PathLike, optional
        Made when the first result is kept. Without one, results are kept in memory.

    Examples
    --------
    >>> store = Store()
    >>> task = {"protocol": {"name": "prefill"}, "method": None}
    >>> store.get(task) is None
    True
    >>> store.put(task, {"nll": [2.5]})
    >>> store.get(task)
    {'nll': [2.5]}
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._known: dict[str, dict[str, Any]] = {}

    def get(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """Return the figures of a task, or None if it is still to be done."""
        key = _key(task)
        if key in self._known:
            return self._known[key]
        if self.folder is None:
            return None
        try:
            kept = json.loads((self.folder / f"{key}.json").read_bytes())
        except (FileNotFoundError, ValueError):  # what somebody damaged is done again
            return None
        if not isinstance(kept, dict) or kept.get("task") != json.loads(_text(task)):
            return None
        figures = kept.get("figures")
        if not isinstance(figures, dict):
            return None
        self._known[key] = figures
        return figures

    def put(self, task: dict[str, Any], figures: dict[str, Any]) -> None:
        """Keep the figures of a task.

        Raises
        ------
        OSError
            Where they cannot be written; those of other tasks stay.
        """
        key = _key(task)
        if self.folder is not None:
            text = json.dumps({"task": task, "figures": figures}, allow_nan=False)
            atomic.write([(self.folder / f"{key}.json", text.encode())], make_folders=True)
        self._known[key] = figures


def _key(task: dict[str, Any]) -> str:
    return hashlib.sha256(_text(task).encode()).hexdigest()[:40]


def _text(task: dict[str, Any]) -> str:
    return json.dumps(task, sort_keys=True, allow_nan=False)
