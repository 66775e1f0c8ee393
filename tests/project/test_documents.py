"""The specification and the tests refer to each other completely."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULE = re.compile(r"\b([A-Z][0-9])\b")


def rules_of_the_specification() -> list[str]:
    text = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    return re.findall(r"^\*\*([A-Z][0-9])\.", text, re.MULTILINE)


def rules_cited_by_tests() -> set[str]:
    cited: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                cited.update(RULE.findall(ast.get_docstring(node) or ""))
    return cited


def test_every_rule_has_one_definition() -> None:
    rules = rules_of_the_specification()
    assert len(rules) == len(set(rules))
    decided = set(RULE.findall("I1 I2 N1 N2 S1 S2 S3 S4 Q1 Q2 P1 M1 M2 M3 M4 D1 D2 B1 B2 K1 C1"))
    assert decided <= set(rules)


def test_every_rule_is_cited_by_a_test() -> None:
    missing = set(rules_of_the_specification()) - rules_cited_by_tests()
    assert not missing, f"no test's docstring cites {sorted(missing)}"


def test_every_cited_rule_exists() -> None:
    known = set(rules_of_the_specification())
    for path in [*(ROOT / "nsq_ref").glob("*.py"), *(ROOT / "tests").glob("test_*.py")]:
        text = path.read_text(encoding="utf-8")
        for cited in re.findall(r"[Rr]ules? ((?:[A-Z][0-9](?:, | and | to )?)+)", text):
            assert set(RULE.findall(cited)) <= known, f"{path.name} cites {cited}"
