"""Tutorials: every command does what the page says it does."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
END = "--- end of a command ---"


def commands(page: str) -> list[tuple[str, str]]:
    """Return the commands of all console blocks, and what each prints."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            more = next((i for i, line in enumerate(lines[1:]) if line[:1] != ">"), len(lines) - 1)
            command = [lines[0], *(re.sub("^> ?", "", line) for line in lines[1 : 1 + more])]
            found.append(("\n".join(command), "".join(f"{x}\n" for x in lines[1 + more :])))
    return found


def test_commands_go_on_over_lines() -> None:
    page = "```console\n$ cat <<'X'\n> a\n>\n> X\na\n\n$ true\n```\n\n```sh\n$ no\n```\n"
    assert commands(page) == [("cat <<'X'\na\n\nX", "a\n\n"), ("true", "")]


@pytest.mark.parametrize(("page", "least"), [("tutorials/shrink-a-cache.md", 11), ("audit.md", 7)])
def test_commands_do_what_the_page_says(page: str, least: int, tmp_path: Path) -> None:
    told = commands((DOCS / page).read_text(encoding="utf-8"))
    assert len(told) >= least
    script = "\n".join(f"{command}\necho '{END}'" for command, _ in told)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not run.returncode, run.stderr
    printed = run.stdout.split(f"{END}\n")[:-1]
    same = doctest.OutputChecker().check_output
    for (command, expected), got in zip(told, printed, strict=True):
        assert same(expected, got, doctest.ELLIPSIS), f"$ {command}\n{got}"
