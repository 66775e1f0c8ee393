"""What is committed of the notebooks; `make docs` executes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return notebook


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_every_notebook_is_in_the_table_of_contents() -> None:
    index = (FOLDER.parent / "index.md").read_text(encoding="utf-8")
    assert NOTEBOOKS
    listed = [line.strip() for line in index.splitlines() if line.startswith("notebooks/")]
    assert listed == [f"notebooks/{name.removesuffix('.ipynb')}" for name in NOTEBOOKS]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nothing_of_a_run_is_stored(name: str) -> None:
    notebook = read(name)
    assert notebook["metadata"] == METADATA
    *cells, last = notebook["cells"]
    assert last["metadata"] == {"tags": ["hide-input"]}  # the claims, not how they are computed
    assert all(cell["metadata"] == {} for cell in cells)
    for cell in notebook["cells"]:
        assert "attachments" not in cell
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_opens_with_a_question_and_ends_with_what_was_learned(name: str) -> None:
    cells = read(name)["cells"]
    title, question = source(cells[0]).split("\n\n")[:2]
    assert title.startswith("# ")
    assert question.startswith("**")
    assert question.endswith("?**")
    assert cells[-2]["cell_type"] == "markdown"
    assert source(cells[-2]).endswith("## What was learned")
    assert cells[-1]["cell_type"] == "code"
    # The claims are computed: `learned` refuses one that does not hold.
    assert "\nlearned(\n" in source(cells[-1])
