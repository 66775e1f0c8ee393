"""What the doctests of the pages leave out."""

from __future__ import annotations

collect_ignore = ["examples"]  # no doctests, and one needs what the tests do not: torch
