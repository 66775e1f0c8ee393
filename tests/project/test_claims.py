"""What the README and the notebooks claim about models rests on docs/fidelity.md."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nsq_ref import Scheme
from nsq_ref.cli import demo
from nsq_ref.comparison import DEMO_SCHEMES
from onnx_export.evaluation.fidelity import TransformFidelity, compare

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.with_name("README.md").read_text(encoding="utf-8")
DEMO: dict[str, Any] = json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(one["source"]) for one in notebook["cells"] if one["cell_type"] == kind]


def test_the_demo_was_run_with_the_schemes_of_today() -> None:
    assert tuple(DEMO["schemes"]) == DEMO_SCHEMES
    for name, one in DEMO["schemes"].items():
        assert Scheme.from_dict(one["key_scheme"]) == Scheme.named(name)
        assert Scheme.from_dict(one["value_scheme"]) == Scheme.named(name)
    assert (DEMO["passages"], DEMO["prefill"], DEMO["continuation"]) == (16, 512, 128)


def test_the_table_of_the_readme_is_what_the_demo_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    demo.show(DEMO)
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    block = README.split("$ make demo\n")[1].split("```")[0]
    assert block.startswith(printed + "\n\n")


def test_the_likelihoods_of_the_notebook_are_those_of_the_demo() -> None:
    """Of the schemes that both have; the notebook itself measures some of them again."""
    kept = json.loads((DOCS / "frontier.json").read_text(encoding="utf-8"))
    pairs = [(kept["baseline"], DEMO["baseline"])]
    pairs += [(kept["schemes"][name], one) for name, one in DEMO["schemes"].items()]
    for first, second in pairs:
        assert first["nll"] == pytest.approx(second["nll"], abs=0.002)
        for side in ("key_scheme", "value_scheme"):
            assert first.get(side) == second.get(side)


def test_what_the_demo_says_follows_from_its_likelihoods() -> None:
    baseline = tuple(DEMO["baseline"]["nll"])
    results = {
        name: TransformFidelity(tuple(one["nll"]), baseline)
        for name, one in DEMO["schemes"].items()
    }
    for name, paired in DEMO["paired_with_nsep+pchan4"].items():
        compared = compare(results, name, "nsep+pchan4")
        assert paired["in_words"] == str(compared)
        assert paired["told_apart"] == compared.told_apart


def test_what_the_readme_says_of_the_table_follows_from_it() -> None:
    """Which schemes cost what can be told from nothing, and from nsep+pchan4."""
    text = " ".join(README.split())
    *names, last = [
        f"`{name}`"
        for name, one in DEMO["schemes"].items()
        if abs(one["nll_change"]) > 2 * one["nll_change_error"]
    ]
    assert f"on this small model {', '.join(names)} and {last} cost something" in text
    assert not any(paired["told_apart"] for paired in DEMO["paired_with_nsep+pchan4"].values())
    assert "no scheme is told apart from `nsep+pchan4`" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_finding_of_a_notebook_is_bold(path: Path) -> None:
    """Neither a sentence that code writes, nor a figure in Markdown."""
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(cell)):
            assert not (isinstance(node, ast.Constant) and "**" in str(node.value)), node.value
    for cell in cells(path, "markdown"):
        assert not re.findall(r"\*\*[^*]*\d[.\d]*( ?%| times| nats|[^*]*±)[^*]*\*\*", cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_read_the_texts_for_reporting_and_name_the_protocol(path: Path) -> None:
    shared = path.with_name("notebook_tools.py").read_text(encoding="utf-8")
    code = "\n".join([shared, *cells(path, "code")])
    calls = re.findall(r"\bpassages\(.*", code)
    assert calls
    assert all("start=REPORTING_START" in call for call in calls)
    if re.search(r"measure_fidelity|likelihoods\(", "\n".join(cells(path, "code"))):
        assert "(../fidelity.md)" in "\n".join(cells(path, "markdown"))
