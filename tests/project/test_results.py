"""docs/results: pages are what the data make, data are of the plans, and measuring goes on."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results import measure, pages, plans, profiles_page
from benchmarks.results.kept import Kept, Mean, filled
from nsq_ref import Feedback, profile_names
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
                as_it_is = method in (measure.EXACT, measure.HALF, measure.LOST)
                assert as_it_is or measure.method_entry(method)


def test_the_profiles_are_measured_with_feedback_and_without(tmp_path: Path) -> None:
    model = TinyModel(context=300)
    decoder = Decoder.from_gguf(model.write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 40, (2, 209))
    queries = random.standard_normal((2, 4, 200, 8)) @ random.standard_normal((8, 8))
    feedback = {str(layer): Feedback.from_queries(one, 2) for layer, one in enumerate(queries)}
    names = ("small-2.5", "best-2.5", "nearest:best-2.5", "naive8|small-2.5", "float32")
    conditions = {name: measure.Condition(name) for name in names}
    found = {}
    for protocol in ("prefill", "decode"):
        plan = measure.Plan(f"of {protocol}", "?", conditions, 2, 200, 8, protocol=protocol)
        assert plan.to_dict()["feedback"]["tokens"] == 1024
        with pytest.raises(ValueError, match=r"best-2\.5 is made for feedback"):
            measure.run(plan, decoder, tokens, print, folder=tmp_path)
        made = measure.fed_back(plan, feedback)
        assert sorted(made) == ["best-2.5.0", "best-2.5.1"]
        measure.run(plan, decoder, tokens, print, calibration=made, folder=tmp_path)
        kept = Kept(plan.name, tmp_path)
        assert kept.samples("small-2.5") == kept.samples("nearest:best-2.5")
        assert kept.samples("small-2.5") != kept.samples("best-2.5")
        assert 0 < kept.mean("naive8|small-2.5").value < kept.mean("small-2.5").value
        assert kept.samples("float32") == pytest.approx([0, 0], abs=1e-6)
        found[protocol] = kept.mean("best-2.5").value
    assert found["decode"] != found["prefill"]
    changed = {"changed": measure.Condition("naive4", {}, (KeyOutlier(0, 3, 40.0),))}
    plan = measure.Plan("other", "?", changed, 1, 200, 8, protocol="decode")
    with pytest.raises(ValueError, match="of prefill alone"):
        measure.run(plan, decoder, tokens, print, folder=tmp_path)


def test_the_page_of_profiles_says_what_was_reached(tmp_path: Path) -> None:
    """Of figures that are made up: each target once as it is, and once just beyond."""
    keys = np.random.default_rng(0).standard_normal((2, 1, 3, 64, 64), dtype=np.float32)
    (plan, *others) = plans.GROUPS["profiles"](keys)
    assert [one.name for one in (plan, *others)] == list(profiles_page.PLANS)
    assert set(profile_names()) < set(plan.conditions)
    largest = profiles_page.LARGEST
    costs = dict.fromkeys(plan.conditions, 1.0) | {
        f"best-{budget}": most for budget, most in largest.items()
    }
    costs |= {f"nearest:best-{budget}": most / 0.9 + 1e-9 for budget, most in largest.items()}
    costs["best-3"] *= 1.01  # of which only KIVI costs more
    costs["nearest:best-2.5"] *= 0.99
    costs["kivi4"] = costs["best-4.5"]
    wobbles = {"best-3": (-1e-5, 1e-5)}  # a passage up and one down, but none with its nearest
    rows = {
        name: [
            {"kl": cost + by, "kl_99": cost, "kl_max": cost, "nll": 2.0, "same_top": 0.5}
            for by in wobbles.get(name, (0.0, 0.0))
        ]
        for name, cost in costs.items()
    }
    kept = {"plan": plan.to_dict(), "baseline": [{"nll": 1.0}] * 2, "rows": rows, "seconds": [1, 1]}
    measure.write(tmp_path / "profiles.json", kept)
    page = profiles_page.page(tmp_path)
    require_filled(filled(page), page)
    rows_of = [line.split(" | ") for line in page.splitlines() if " | best-" in line]
    verdicts = {tuple(row[1:3]): row[4].rstrip(" |") for row in rows_of}
    assert len(verdicts) == len(rows_of) == 12
    missed = {found for found, verdict in verdicts.items() if verdict.startswith("**missed**")}
    assert missed == {
        ("best-3", "KL at most .00700 at 3.05 bits"),
        ("best-3", "at most 0.9 of nearest:best-3"),
        ("best-2.5", "at most 0.9 of nearest:best-2.5"),
        ("best-4.5", "below kivi4"),
    }
    assert verdicts["best-3.5", "below kivi3"] == "reached"
    assert verdicts["best-4.5", "below kivi4"] == "**missed**, not told apart"
    assert verdicts["best-3", "KL at most .00700 at 3.05 bits"] == "**missed**"
    assert "| **best-3** | 3.00 | 3.03 | .00707 ± " in page
    assert "| kivi2 | 3.00 | 4.62 | 1.00 ± 0 |" in page
    assert "Gemma" not in page


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
