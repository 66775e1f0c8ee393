"""Known deviations: what a file says, that each must still fail, and what is not listed counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance import as_json, as_junit, as_text, check
from nsq_ref.conformance.findings import Report
from nsq_ref.conformance.known import read_known
from nsq_ref.conformance.report import case_name
from tests.ports.functions import attend, decode, stream
from tests.support.cases import cases_made_once

__all__ = ["cases_made_once"]  # the fixture


def far(x: Any, scheme: Scheme) -> Any:
    """M1. Norms of small arrays of float16 are wrong."""
    parts = dict(nsq.quantize(x, scheme).parts)
    if x.dtype == np.float16 and x.size < 100:
        parts["norm"] = np.nextafter(parts["norm"], np.float16(np.inf))
    return parts


def checked(path: Path | None, **options: Any) -> Report:
    given: dict[str, Any] = {"scheme": "nsep4", "quick": True, "known": path, **options}
    return check(far, **given)


@pytest.fixture(scope="module")
def wrong() -> list[str]:
    """The cases that fail."""
    found = checked(None).schemes[0].diagnoses
    return sorted({case_name(f.case) for one in found for f in one.findings})


def test_known_deviations_are_let_pass_and_told(tmp_path: Path, wrong: list[str]) -> None:
    """M1. All that fails is listed: exit code 0, but no CONFORMS without a remark."""
    lines = [f"{name}: the norm of halves, issue 12" for name in wrong]
    path = tmp_path / "known"
    path.write_text("\n".join(["# mine", "", *lines]))
    report = checked(path)
    assert report.conforms
    assert not report.is_whole
    text = " ".join(as_text(report).split())
    asked = [case_name(case) for case in report.schemes[0].cases if case_name(case) in wrong]
    assert f"but for {len(wrong)} known deviation" in text
    assert "the norm of halves, issue 12" in text
    assert [one["case"] for one in as_json(report)["schemes"][0]["known"]] == asked
    assert as_junit(report).count("known: the norm of halves") == len(wrong)


def test_what_is_not_listed_still_fails(tmp_path: Path, wrong: list[str]) -> None:
    """M1. One line less is one case more."""
    path = tmp_path / "known"
    path.write_text("\n".join(f"{name}: why" for name in wrong[1:]))
    report = checked(path)
    assert not report.conforms
    found = report.schemes[0].diagnoses
    assert {case_name(f.case) for one in found for f in one.findings} == {wrong[0]}


def test_a_deviation_that_no_longer_fails_is_an_error(tmp_path: Path, wrong: list[str]) -> None:
    """The file says what is so, or the check fails."""
    path = tmp_path / "known"
    path.write_text("\n".join(f"{name}: why" for name in [*wrong, "encode/padding/*"]))
    report = checked(path)
    assert not report.conforms
    assert "Known to fail, but right now" in as_text(report)
    assert 'type="mended"' in as_junit(report)


def test_lines_are_about_one_scheme_if_they_say_so(tmp_path: Path, wrong: list[str]) -> None:
    path = tmp_path / "known"
    path.write_text("\n".join(f"nsep8/{name}: why" for name in wrong))
    assert not checked(path).conforms
    assert checked(path, scheme="nsep8").conforms


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("encode/exact-tie/0", "names no cases"),
        ("encode/exact-tie/0:", "gives no reason"),
        ("encode/exact-tie/0 to: why", "names no cases"),
        ("exact-tie/0: why", "names no cases"),
        ("encode/exact-tie/0, x: why", "names no cases"),
    ],
)
def test_lines_are_read_strictly(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "known"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(ValueError, match=f"known:2 {says}"):
        read_known(path)


def test_a_line_about_no_case_is_refused_where_all_is_asked(tmp_path: Path) -> None:
    """Where some was not asked, it is counted."""
    path = tmp_path / "known"
    path.write_text("encode/no-such-family/0: why")
    some = check(nsq.quantize, scheme="naive2", quick=True, known=path)
    assert any("1 of 1 known deviations" in note for note in some.notes)
    everything: dict[str, Any] = {"attend": attend, "decode": decode, "stream": stream}
    with pytest.raises(ValueError, match="known:1 names no case of naive2"):
        check(nsq.quantize, **everything, scheme="naive2", known=path)
