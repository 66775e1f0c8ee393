"""Vectors are only ever added to; archives are the same everywhere."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsq_ref import Scheme
from nsq_ref.conformance import vectors
from nsq_ref.conformance.operations import Case
from nsq_ref.conformance.vectors import writing


def document(file: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((vectors.FOLDER / file).read_bytes())
    return parsed


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files, quickly written."""
    monkeypatch.setattr(writing, "SCHEMES", {"pchan4": vectors.SCHEMES["pchan4"]})
    monkeypatch.setattr(writing, "LARGE", ())


@pytest.mark.usefixtures("small")
def test_cases_are_only_ever_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    vectors.write(tmp_path / "new", told.append)
    assert told == vectors.files() == ["encode-pchan4.json"]
    file = tmp_path / "new" / "encode-pchan4.json"
    before = file.read_bytes()
    assert before == (vectors.FOLDER / file.name).read_bytes()
    vectors.write(tmp_path / "new")
    encoded = writing._cases("encode", "pchan4")
    monkeypatch.setattr(writing, "_all_cases", lambda name: encoded[:-1])
    with pytest.raises(ValueError, match=f"1 cases in .*, the first is .*: {encoded[-1].id}"):
        vectors.write(tmp_path / "new")
    other = encoded[1].inputs["x"] * np.float32(3)
    changed = Case(encoded[0].id, "encode", encoded[0].scheme, encoded[0].flags, {"x": other})
    monkeypatch.setattr(writing, "_all_cases", lambda name: [changed, *encoded[1:]])
    with pytest.raises(ValueError, match=f"1 cases in .*, the first is .*: {encoded[0].id}"):
        vectors.write(tmp_path / "new")
    assert file.read_bytes() == before
    added = Case("ordinary/99", "encode", encoded[0].scheme, ("ordinary",), {"x": other})
    monkeypatch.setattr(writing, "_all_cases", lambda name: [*encoded, added])
    vectors.write(tmp_path / "new")
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_bytes())
    assert manifest["files"][file.name]["ids"] == [case.id for case in [*encoded, added]]


@pytest.mark.usefixtures("small")
def test_a_file_that_is_dropped_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors.write(tmp_path)
    monkeypatch.setattr(writing, "SCHEMES", {"naive4": Scheme.named("naive4")})
    with pytest.raises(ValueError, match=r"the first is encode-pchan4.json: "):
        vectors.write(tmp_path)


@pytest.mark.usefixtures("small")
def test_a_name_that_means_another_scheme_changes_every_case(tmp_path: Path) -> None:
    """A case with the same answer, or refused either way, is another question all the same."""
    vectors.write(tmp_path)
    file = tmp_path / "encode-pchan4.json"
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace('"scale_rule": "range"', '"scale_rule": "search"'), "utf-8")
    count = len(json.loads(before)["cases"])
    with pytest.raises(ValueError, match=f"^{count} cases in .* would be dropped or changed"):
        vectors.write(tmp_path)


def test_names_that_are_none() -> None:
    for file in ("encode-nsep+pchan5.json", "large-naive4.safetensors", "manifest.json", ""):
        with pytest.raises(ValueError, match="is not a file of vectors"):
            vectors.content(file)
    with pytest.raises(ValueError, match="is not one of"):
        vectors.load("manifest")


def exported() -> dict[str, bytes]:
    files = [*vectors.FOLDER.iterdir(), vectors.FOLDER.parents[1] / "nsq.h"]
    return {file.name: file.read_bytes() for file in files}


def test_export_to_a_directory(tmp_path: Path) -> None:
    vectors.export(tmp_path / "a" / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a" / "b").iterdir()} == exported()


def test_export_to_archives(tmp_path: Path) -> None:
    for name in ("one.tar.gz", "two.tar.gz", "one.zip", "two.zip"):
        vectors.export(tmp_path / name)
    for ending in ("tar.gz", "zip"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (
            tmp_path / f"two.{ending}"
        ).read_bytes()
    assert (tmp_path / "one.tar.gz").read_bytes()[4:8] == bytes(4)  # the time in gzip's header
    wanted = {f"nsq-vectors-v1/{name}": data for name, data in exported().items()}
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == sorted(wanted)
        assert {name: archive.read(name) for name in archive.namelist()} == wanted
        assert {one.date_time for one in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with tarfile.open(tmp_path / "one.tar.gz") as tar:
        members = tar.getmembers()
        assert [one.name for one in members] == sorted(wanted)
        assert {(one.mtime, one.mode, one.uid, one.uname) for one in members} == {(0, 0o644, 0, "")}
        for one in members:
            content = tar.extractfile(one)
            assert content is not None
            assert content.read() == wanted[one.name]
