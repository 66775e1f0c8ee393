"""The shipped vectors are what the oracle writes, and what their schema and manifest say."""

from __future__ import annotations

import hashlib
import json
import runpy
import zlib
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from nsq_ref.conformance import vectors
from nsq_ref.conformance.cases.flags import FLAGS

MANIFEST: dict[str, Any] = json.loads((vectors.FOLDER / "manifest.json").read_bytes())
FILES = list(MANIFEST["files"])
JSON_FILES = [file for file in FILES if file.endswith(".json")]
SCHEMA: dict[str, Any] = json.loads((vectors.FOLDER / "schema.json").read_bytes())


def document(file: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((vectors.FOLDER / file).read_bytes())
    return parsed


@pytest.mark.parametrize("file", FILES)
def test_file_is_what_the_oracle_writes(file: str) -> None:
    """N1 N2 O1 S1 S2 S3 S4 Z1 Q1 Q2 P1 M1 M2 M3 D1 B1 K1 C1 A1 A3 F1, as bytes."""
    assert (vectors.FOLDER / file).read_bytes() == vectors.content(file)


def test_manifest_names_every_file() -> None:
    assert vectors.files() == FILES
    contents = {file: (vectors.FOLDER / file).read_bytes() for file in FILES}
    assert (vectors.FOLDER / "manifest.json").read_bytes() == vectors.manifest(contents)
    shipped = {path.name for path in vectors.FOLDER.iterdir()}
    assert shipped == {*FILES, "manifest.json", "schema.json", "README.md"}
    assert vectors.names() == sorted(file.removesuffix(".json") for file in JSON_FILES)


@pytest.mark.parametrize("file", FILES)
def test_manifest_describes_the_file(file: str) -> None:
    data, entry = (vectors.FOLDER / file).read_bytes(), MANIFEST["files"][file]
    assert (entry["sha256"], entry["size"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert entry["numberOfCases"] == len(entry["ids"]) == len(set(entry["ids"])) > 0
    if file in JSON_FILES:
        parsed = json.loads(data)
        assert [case["id"] for case in parsed["cases"]] == entry["ids"]
        assert parsed["numberOfCases"] == len(entry["ids"])


@pytest.mark.parametrize("file", JSON_FILES)
def test_flags_and_notes_are_the_same(file: str) -> None:
    parsed = document(file)
    used = {flag for case in parsed["cases"] for flag in case["flags"]}
    assert used == set(parsed["notes"])
    for flag, note in parsed["notes"].items():
        assert note == {
            "bugType": FLAGS[flag].bug_type,
            "rule": FLAGS[flag].rule,
            "description": FLAGS[flag].description,
        }


def test_all_of_it_stays_small() -> None:
    """As a wheel has it, deflated."""
    files = vectors.FOLDER.iterdir()
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) < 3_000_000


def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("file", JSON_FILES)
def test_schema_allows_the_file(file: str) -> None:
    validator().validate(document(file))


def objects_of(schema: Any) -> list[dict[str, Any]]:
    """Every schema of an object that names properties, outside of conditions."""
    found = []
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            found.append(schema)
        for value in schema.values():
            found += objects_of(value)
    elif isinstance(schema, list):
        for value in schema:
            found += objects_of(value)
    return found


def test_schema_allows_no_further_property_anywhere() -> None:
    objects = objects_of(SCHEMA)
    assert len(objects) > 10
    assert all(one["additionalProperties"] is False for one in objects)


Mutation = Callable[[dict[str, Any]], None]
MUTATIONS: dict[str, Mutation] = {
    "a further property": lambda file: file.update(comment=""),
    "a missing property": lambda file: file.pop("notes"),
    "another version": lambda file: file.update(formatVersion=2),
    "an unknown operation": lambda file: file.update(operation="quantize"),
    "a further field of the scheme": lambda file: file["scheme"].update(group_size=32),
    "a missing field of the scheme": lambda file: file["scheme"].pop("bits"),
    "a further property of a case": lambda file: file["cases"][0].update(comment=""),
    "a missing property of a case": lambda file: file["cases"][0].pop("refusedBy"),
    "a note without a rule": lambda file: next(iter(file["notes"].values())).pop("rule"),
    "a case without a reason": lambda file: file["cases"][0].update(flags=[]),
    "an unknown result": lambda file: file["cases"][0].update(result="failed"),
    "a rule where nothing is refused": lambda file: file["cases"][0].update(refusedBy="I2"),
    "no rule where it is refused": lambda file: file["cases"][0].update(
        result="refused", expected={}, intermediates={}
    ),
    "answers where it is refused": lambda file: file["cases"][0].update(
        result="refused", refusedBy="I2"
    ),
    "an unknown part": lambda file: file["cases"][0]["expected"].update(
        offset=file["cases"][0]["expected"]["scale"]
    ),
    "a missing part": lambda file: file["cases"][0]["expected"].pop("packed"),
    "a missing stage": lambda file: file["cases"][0]["intermediates"].pop("codes"),
    "an input of another operation": lambda file: file["cases"][0]["inputs"].update(
        row=file["cases"][0]["inputs"]["x"]
    ),
    "a further property of an array": lambda file: file["cases"][0]["inputs"]["x"].update(a=1),
    "an unknown dtype": lambda file: file["cases"][0]["inputs"]["x"].update(dtype="float8"),
    "half a byte": lambda file: file["cases"][0]["inputs"]["x"].update(data="0000803"),
    "no hexadecimal": lambda file: file["cases"][0]["inputs"]["x"].update(data="0000803g"),
    "capital letters": lambda file: file["cases"][0]["inputs"]["x"].update(data="0000803F"),
    "a negative axis": lambda file: file["cases"][0]["inputs"]["x"].update(shape=[-1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_schema_rejects(mutation: Mutation) -> None:
    file = document("encode-nsep+pchan4.json")
    assert file["cases"][0]["result"] == "done"
    mutation(file)
    assert not validator().is_valid(file)


def test_only_the_command_writes_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools import all modules of a package."""
    monkeypatch.setattr(vectors, "write", lambda *_: pytest.fail("it writes"))
    runpy.run_module("nsq_ref.conformance.vectors.__main__", run_name="imported")
