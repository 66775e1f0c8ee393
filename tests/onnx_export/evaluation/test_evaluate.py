"""`evaluate`: what is done once, what is kept, what is refused, and what is said of the result."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_export.evaluation import (
    CausalModel,
    Decode,
    Difference,
    Evaluation,
    Free,
    Lengths,
    Method,
    Prefill,
    Store,
    evaluate,
    open_model,
)
from onnx_export.models.tiny import tiny_gguf
from tests.support.evaluated import Counting

TEXT = np.random.default_rng(0).integers(0, 260, (4, 60))
NAMES = ["naive4", "naive8", "nsep+pchan4"]
SHORT = Prefill(40, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    folder = tmp_path_factory.mktemp("evaluate")
    return open_model(tiny_gguf(folder), cache_dir=folder)


@pytest.fixture(scope="module")
def found(model: CausalModel) -> Evaluation:
    return evaluate(model, TEXT, NAMES, protocol=SHORT)


def test_the_float32_logits_are_computed_once(model: CausalModel) -> None:
    for names in (NAMES[:1], NAMES):
        counting = Counting(model)
        progress: list[tuple[int, int]] = []
        evaluate(
            counting,
            TEXT,
            names,
            protocol=SHORT,
            progress=lambda what, done, total, seen=progress: seen.append((done, total)),
        )
        # Of each passage the context, and what follows it; before all, some tokens in pieces.
        assert counting.calls == 4 * (2 + len(names)) + 3
        total = 4 * (1 + len(names))
        assert progress == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("at", [0, 1, 3, 7, 12, 20])
def test_a_run_that_was_ended_goes_on(
    model: CausalModel, found: Evaluation, tmp_path: Path, at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(Counting(model, at), TEXT, NAMES, protocol=SHORT, store=tmp_path / "kept")
    kept = {one: one.read_bytes() for one in (tmp_path / "kept").glob("*")}
    assert all(json.loads(text)["figures"] for text in kept.values())
    again = Counting(model)
    result = evaluate(again, TEXT, NAMES, protocol=SHORT, store=tmp_path / "kept")
    assert result == found
    assert again.calls + at <= 23 + 2 + 3  # at most a passage's context is read again
    for path, text in kept.items():
        done = json.loads(text)["task"]["method"]
        assert done is None or path.read_bytes() == text
    third = Counting(model)
    assert evaluate(third, TEXT, NAMES, protocol=SHORT, store=tmp_path / "kept") == found
    assert third.calls == 0
    more = Counting(model)
    evaluate(more, TEXT, ["naive2", *NAMES], protocol=SHORT, store=tmp_path / "kept")
    assert more.calls == 4 * 3 + 3


def test_what_was_damaged_is_measured_again(
    model: CausalModel, found: Evaluation, tmp_path: Path
) -> None:
    evaluate(model, TEXT, NAMES, protocol=SHORT, store=tmp_path)
    paths = sorted(tmp_path.glob("*.json"))
    paths[0].write_bytes(paths[0].read_bytes()[:50])
    paths[1].write_bytes(paths[2].read_bytes())
    paths[3].write_text("[]")
    paths[4].unlink()
    assert evaluate(model, TEXT, NAMES, protocol=SHORT, store=tmp_path) == found


def test_figures_are_known_by_all_that_they_depend_on(model: CausalModel, tmp_path: Path) -> None:
    """Whatever changes, nothing is taken for something else."""

    class Other(Counting):
        def __init__(self) -> None:
            super().__init__(model)
            self.fingerprint = "other weights"

    evaluate(model, TEXT[:2], ["naive4", "naive8"], protocol=SHORT, store=tmp_path)
    changes: list[dict[str, Any]] = [
        {"model": Other()},
        {"tokens": TEXT[:2] + (np.arange(60) == 39) - (TEXT[:2] == 259)},
        {"entries": ["naive2", "naive3"]},
        {"protocol": Prefill(40, 15)},
        {"protocol": Prefill(39, 16)},
        {"protocol": Decode(40, 16)},
        {"protocol": Lengths((40,), 16)},
    ]
    for change in changes:
        counting = change.pop("model", Counting(model))
        given = {"tokens": TEXT[:2], "entries": ["naive4", "naive8"], "protocol": SHORT}
        evaluate(counting, store=tmp_path, **{**given, **change})  # type: ignore[arg-type]
        assert counting.calls >= 2 * 4
    # But a name is only a name.
    named = Counting(model)
    evaluate(named, TEXT[:2], {"a": "naive8", "b": "naive4"}, protocol=SHORT, store=tmp_path)
    assert named.calls == 0


def test_calibration_is_of_other_text_and_part_of_the_task(
    model: CausalModel, tmp_path: Path
) -> None:
    names = ["onnxruntime-int4"]
    with pytest.raises(ValueError, match="onnxruntime-int4 has static scales; give calibration"):
        evaluate(model, TEXT, names, protocol=SHORT)
    results = [
        evaluate(model, TEXT, names, protocol=SHORT, calibration=other, store=tmp_path)
        for other in (TEXT[:2, ::-1], TEXT[2:, ::-1])
    ]
    first, second = (one.records["onnxruntime-int4"] for one in results)
    assert first != second
    _, keys, values = model.forward(TEXT[:2, ::-1][:1])
    _, more, others = model.forward(TEXT[:2, ::-1][1:])
    scales = np.concatenate([keys, more], axis=3), np.concatenate([values, others], axis=3)
    method = Method.of("onnxruntime-int4").bound(2, scales)
    _, size = method.replaced(*model.forward(TEXT[:1, :40])[1:])
    assert first[""][0]["size"] == list(size)


def test_methods_that_this_model_cannot_have_are_told(model: CausalModel) -> None:
    found = evaluate(model, TEXT, ["kivi2", "q4_0", "naive4"], protocol=SHORT)
    assert list(found.records) == ["kivi2", "naive4"]  # of so few tokens kivi2 keeps all
    assert found.refused == {"q4_0": "x has head_dim 8; q4_0 needs a multiple of 32, as published"}
    with pytest.raises(ValueError, match=r"no figures of 'q4_0'.*needs a multiple of 32"):
        found.figures("q4_0")
    shown = found.to_dict()
    assert list(shown["tables"][0]["schemes"]) == ["kivi2", "naive4"]
    assert "- q4_0 was refused: x has head_dim 8" in found.to_markdown()


class Forgetful(Counting):
    """Reads without its cache, as an encoder does; or gives what is no number."""

    def __init__(self, model: CausalModel, *, finite: bool = True) -> None:
        super().__init__(model)
        self.finite = finite

    def forward(self, input_ids: Any, past: Any = None, *, num_logits: Any = None) -> Any:
        logits, *cache = self.model.forward(input_ids, past, num_logits=num_logits)
        if past is not None:
            logits, _, _ = self.model.forward(input_ids, num_logits=num_logits)
        return (logits if self.finite else logits * np.nan, *cache)


def test_a_model_whose_cache_is_not_all_it_reads_is_refused(model: CausalModel) -> None:
    with pytest.raises(ValueError, match=r"in pieces otherwise than at once \(logits differ by \d"):
        evaluate(Forgetful(model), TEXT, ["naive4"], protocol=SHORT)
    with pytest.raises(ValueError, match="logits are not finite, with the float32 cache"):
        evaluate(Forgetful(model, finite=False), TEXT, ["naive4"], protocol=SHORT)


def test_figures_are_of_tokens_and_passages(found: Evaluation) -> None:
    table = json.loads(json.dumps(found.to_dict(), allow_nan=False))["tables"][0]
    for name in NAMES:
        shown = table["schemes"][name]
        records = found.records[name][""]
        every = np.concatenate([one["kl"] for one in records])
        means = np.array([np.mean(one["kl"]) for one in records])
        nll = np.array([np.mean(one["nll"]) for one in records])
        base = np.array(table["baseline"]["nll"])
        assert shown["kl"]["mean"] == pytest.approx(means.mean())
        assert shown["kl"]["error"] == pytest.approx(means.std(ddof=1) / 2)
        assert shown["kl"]["passages"] == pytest.approx(means)
        for quantile, share in (("median", 50), ("p99", 99), ("p999", 99.9), ("max", 100)):
            assert shown["kl"][quantile] == pytest.approx(np.percentile(every, share))
        assert shown["nll"]["change"] == pytest.approx((nll - base).mean())
        assert shown["nll"]["change_error"] == pytest.approx((nll - base).std(ddof=1) / 2)
        assert shown["perplexity"] == pytest.approx(math.exp(nll.mean()))
        assert shown["top1"]["mean"] == pytest.approx(np.mean([one["top1"] for one in records]))
        sizes = np.sum([one["size"] for one in records], axis=0)
        assert found.figures(name).size == tuple(sizes.tolist())
    # Codes, a scale for each token; a norm, and a scale a channel, for 40 tokens of 8 channels.
    bits = [table["schemes"][name]["bits_per_element"] for name in NAMES]
    assert bits == [4 + 16 / 8, 8 + 16 / 8, 4 + 16 / 8 + 16 / 40]
    assert table["scored_tokens"] == 4 * 16


def test_with_and_without_what_is_kept(model: CausalModel) -> None:
    shown = evaluate(model, TEXT, ["streaming4"], protocol=SHORT).to_dict()["tables"][0]
    size = shown["schemes"]["streaming4"]
    sealed = 4 + 16 / 8 + 2 * 16 / 39
    assert size["sealed_bits_per_element"] == pytest.approx(sealed)
    assert size["bits_per_element"] == pytest.approx((39 * sealed + 16) / 40)


def test_a_single_passage_has_no_error(model: CausalModel) -> None:
    found = evaluate(model, TEXT[:1], NAMES, protocol=SHORT)
    shown = found.to_dict()["tables"][0]
    assert shown["schemes"]["naive4"]["kl"]["error"] is None
    assert shown["paired"] == []
    with pytest.raises(ValueError, match="at least two; there is one"):
        found.compare("naive4", "naive8")
    assert "| naive4 | 6.00 | 6.00 | 0." in found.to_markdown()


def test_written_text_has_its_own_figures(model: CausalModel) -> None:
    found = evaluate(model, TEXT, ["naive4", "naive2"], protocol=Free(30, 8, block=8))
    shown = json.loads(json.dumps(found.to_dict(), allow_nan=False))["tables"][0]
    assert set(shown["schemes"]["naive2"]) == {
        "bits_per_element", "sealed_bits_per_element", "first_divergence", "agreement", "diversity",
    }  # fmt: skip
    assert "| scheme | bits | without tail | first divergence |" in found.to_markdown()
    assert found.ordered("")[-1] == "naive2"


WRONG = {
    "floats": (TEXT * 1.0, TypeError, "dtype float64"),
    "one row": (TEXT[0], (TypeError, ValueError), "tokens"),
    "none": (np.zeros((0, 60), int), ValueError, "must be passages"),
    "another vocabulary": (
        TEXT + 1,
        ValueError,
        r"tokens\[\d\]\[\d+\] is 260, outside the vocabulary of 260 tokens of tiny",
    ),
    "a short one": ([TEXT[0], TEXT[1][:50]], ValueError, "passage 1 has 50 tokens, and prefill"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tokens_are_refused_before_the_work(model: CausalModel, name: str) -> None:
    tokens, kind, message = WRONG[name]
    counting = Counting(model)
    with pytest.raises(kind, match=message):
        evaluate(counting, tokens, ["naive4"], protocol=SHORT)
    assert counting.calls == 0


def test_who_opens_no_file_has_no_workers(model: CausalModel) -> None:
    with pytest.raises(ValueError, match="give its file, not a Decoder"):
        evaluate(model, TEXT, ["naive4"], protocol=SHORT, workers=2)
    with pytest.raises(ValueError, match="workers=0"):
        evaluate(model, TEXT, ["naive4"], protocol=SHORT, workers=0)


def test_a_store_that_cannot_be_written(model: CausalModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        evaluate(model, TEXT, ["naive4"], protocol=SHORT, store=tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path).put({}, {"kl": math.inf})
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


# --- what may be said ---------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(-8, 8)] * 2), min_size=2, max_size=9))
def test_the_p_value_is_of_all_signs(pairs: list[tuple[int, int]]) -> None:
    """How many of all ways to swap the two are as extreme; integers, so that ties are ties."""
    ours, others = (np.array(one, float) for one in zip(*pairs, strict=True))
    found = Difference.of("a", "b", "kl", ours, others)
    difference = ours - others
    signs = np.array(np.meshgrid(*[[1, -1]] * len(pairs))).reshape(len(pairs), -1)
    sums = difference @ signs
    tails = [(sums <= difference.sum()).mean(), (sums >= difference.sum()).mean()]
    assert found.p_value == pytest.approx(min(1, 2 * min(tails)))
    assert found.mean == pytest.approx(difference.mean())
    assert found.interval[0] <= found.mean + 1e-12
    assert found.interval[1] >= found.mean - 1e-12
    error = difference.std(ddof=1) / math.sqrt(len(pairs))
    assert found.told_apart == (abs(difference.mean()) > 2 * error)


def test_methods_are_compared_with_the_first_and_with_neighbours(found: Evaluation) -> None:
    order = found.ordered("")
    assert order[0] == "naive8"
    pairs = [(one.first, one.second) for one in found.differences("")]
    assert pairs[:2] == [("naive8", "naive4"), ("nsep+pchan4", "naive4")]
    assert {frozenset(pair) for pair in itertools.pairwise(order)} <= {
        frozenset(pair) for pair in pairs
    }
    other = found.compare("naive4", "naive8")
    assert other.mean == -found.compare("naive8", "naive4").mean > 0
    exact = found.compare("naive4", figure="nll")
    assert exact.second == "float32"
    assert exact.mean == pytest.approx(
        found.to_dict()["tables"][0]["schemes"]["naive4"]["nll"]["change"]
    )
