"""Each function on plain arrays stands in the module of its section of docs/bounds.md."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from nsq_ref import bounds

PAGE = Path(__file__).parents[3] / "docs" / "bounds.md"
SECTIONS = {
    "direction": ("E1", "E2"),
    "token": ("E3", "E4", "E5"),
    "attention": ("E6", "E7", "E8"),
    "feedback": ("E10",),
    "norm": ("Words and small facts", "E9"),
    "before_data": ("Before any data",),
    "certificates": ("Who knows what",),
}
FUNCTIONS = [name for name in bounds.__all__ if inspect.isfunction(getattr(bounds, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_in_the_module_of_its_section(name: str) -> None:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    module = getattr(bounds, name).__module__.removeprefix("nsq_ref.bounds.")
    heads = tuple(f"{head}:" if re.match(r"E\d", head) else head for head in SECTIONS[module])
    here = [text for text in sections if text.startswith(heads)]
    assert len(here) == len(SECTIONS[module])
    assert any(re.search(rf"`{name}[`(]", text) for text in here)
