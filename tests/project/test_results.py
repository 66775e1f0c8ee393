"""docs/results: pages are what the data make, data are of the plans, and measuring goes on."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results import measure, pages, plans
from benchmarks.results.kept import Kept, Mean, filled
from nsq_ref.rivals import entry
from onnx_export.evaluation.injected import KeyOutlier, injected_onnx
from onnx_export.evaluation.scoring import Reference
from onnx_export.models.decoder import Decoder, cached_onnx
from tests.support.llama_oracle import TinyModel

DOCS = Path(__file__).parents[2] / "docs" / "results"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
SMALL = {
    "exact": measure.Condition(measure.EXACT),
    "half": measure.Condition(measure.HALF),
    "naive4, layer 1 exact": measure.Condition("naive4", {1: measure.EXACT}),
    "keys lost": measure.Condition(f"{measure.LOST}|{measure.EXACT}"),
    "outlier": measure.Condition("naive4", {}, (KeyOutlier(0, 3, 40.0),)),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_data_make(name: str) -> None:
    made = pages.index() if name == "index" else pages.PAGES[name][0]()
    page = f"{filled(made).rstrip()}\n"
    require_filled(page, made)
    written = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert written == page, "run `make results` and look at what changed"


def require_filled(page: str, made: str) -> None:
    """Only line ends have moved; prose is as wide as it can be, and begins no list."""
    assert page.split() == made.split()
    assert filled(page) == page.rstrip()
    for mark in ("|", "#", "![", "- "):
        own, others = (
            [line for line in text.splitlines() if line.startswith(mark)] for text in (page, made)
        )
        assert len(own) == len(others)
        if mark != "- ":
            assert own == others
    prose = re.sub(r"^```.*?^```|^\$\$.*?\$\$", "", page, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "#", "!["))]
    for line, after in itertools.pairwise(lines):
        assert len(line) <= 100 or " " not in line.strip()
        if line and after and not after.startswith("- "):
            word = after.partition("`")[2].partition("`")[0] if after.startswith("`") else ""
            assert len(line) + len(word or after.split()[0]) >= 98, (line, after)


def test_every_figure_is_on_a_page_and_every_page_has_its_figures() -> None:
    named = {
        one
        for name in PAGES
        for one in re.findall(r"!\[.*?\]\((.*?)\)", (DOCS / f"{name}.md").read_text("utf-8"))
    }
    assert named == {path.name for path in DOCS.glob("*.png")}


def test_data_are_of_the_plans() -> None:
    keys = np.random.default_rng(0).standard_normal((30, 1, 3, 64, 64), dtype=np.float32)
    planned = {plan.name: plan for group in plans.GROUPS.values() for plan in group(keys)}
    for path in sorted((DOCS / "data").glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if "rows" not in kept:
            continue
        plan = planned[path.stem].to_dict()
        assert list(kept["plan"]["conditions"]) == list(plan["conditions"])
        for what in ("question", "texts", "prefill", "continuation"):
            assert kept["plan"][what] == plan[what]
        assert set(kept["rows"]) <= set(plan["conditions"])
        assert {len(rows) for rows in kept["rows"].values()} == {len(kept["baseline"])}
        for one in kept["plan"]["conditions"].values():
            for method in one["rest"].split("|"):
                assert method in (measure.EXACT, measure.HALF, measure.LOST) or entry(method)


def test_measuring_goes_on_where_it_was_and_costs_are_of_the_cache(tmp_path: Path) -> None:
    decoder = Decoder.from_gguf(TinyModel().write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    tokens = np.random.default_rng(0).integers(0, 40, (3, 31))
    said: list[str] = []

    def run(count: int, folder: str) -> dict[str, object]:
        plan = measure.Plan("small", "?", SMALL, count, 20, 8)
        measure.run(plan, decoder, tokens, said.append, folder=tmp_path / folder)
        kept = json.loads((tmp_path / folder / "small.json").read_text("utf-8"))
        del kept["seconds"]
        return dict(kept)

    run(1, "twice")
    assert len(said) == len(SMALL)
    assert run(3, "twice") == run(3, "once")
    assert len(said) == 6 * len(SMALL), "what was measured is not measured again"
    found = Kept("small", tmp_path / "once")
    assert found.samples("exact") == [0.0] * 3
    assert found.samples("exact", "nll") == [0.0] * 3
    assert 0 < found.mean("half").value < 1e-4 < found.mean("naive4, layer 1 exact").value
    assert found.mean("naive4, layer 1 exact").value < found.mean("outlier").value
    with pytest.raises(ValueError, match="of another plan; remove it"):
        measure.run(
            measure.Plan("small", "another", SMALL, 3, 20, 8), decoder, tokens, said.append,
            folder=tmp_path / "once",
        )  # fmt: skip


def test_as_if_injected_measures_what_the_injected_model_does(tmp_path: Path) -> None:
    path = cached_onnx(TinyModel().write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    changes = (KeyOutlier(0, 1, 32.0),)
    changed = Decoder(injected_onnx(path, tmp_path / "changed", changes))
    tokens = np.random.default_rng(1).integers(0, 40, (2, 31))
    as_if = {"q": measure.Condition("naive4", {1: measure.EXACT}, changes)}
    truly = {"q": measure.Condition("naive4", {1: measure.EXACT})}
    figures = []
    for name, decoder, conditions in (("a", Decoder(path), as_if), ("b", changed, truly)):
        plan = measure.Plan(name, "?", conditions, 2, 20, 8)
        measure.run(plan, decoder, tokens, print, folder=tmp_path)
        figures.append(Kept(name, tmp_path).samples("q"))
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    assert min(figures[0]) > 1e-4


def test_divergence_and_errors_are_those_of_the_definition() -> None:
    random = np.random.default_rng(0)
    exact, other = random.standard_normal((2, 5, 7)).astype(np.float32)
    targets = np.array([0, 3, 6, 2, 2])
    found = measure.figures(Reference(exact, targets).scores(other))
    divergences, likelihoods = [], []
    for row, changed, target in zip(exact.tolist(), other.tolist(), targets, strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, one)) for x in one] for one in (row, changed))
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        likelihoods.append(-math.log(q[target]))
    assert found["kl"] == pytest.approx(sum(divergences) / 5, rel=1e-4)
    assert found["kl_max"] == pytest.approx(max(divergences), rel=1e-4)
    assert found["nll"] == pytest.approx(sum(likelihoods) / 5, rel=1e-4)
    mean = Mean.of([1.0, 2.0, 6.0])
    assert (mean.value, mean.count) == (3.0, 3)
    assert mean.error == pytest.approx(math.sqrt(7 / 3))
    assert not mean.told
    assert str(Mean.of([0.01, 0.012])) == ".0110 ± .0010"
