"""States in files: whole or not at all, of this model, and nothing else is taken."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from nsq_ref.files import containers
from onnx_export.running import Model, Session
from tests.support import lookup_decoder

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [4, 5]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(lookup_decoder.quantized(tmp_path_factory.mktemp("lookup"), context_length=40))


def reader(model: Model, **options: Any) -> Session:
    session = Session(model, batch=2, **options)
    session.forward(PROMPTS)
    return session


def test_equal_states_are_equal_files(model: Model, tmp_path: Path) -> None:
    """However they came about, and whatever lies behind the tokens."""
    one, other = reader(model), Session(model, batch=2, capacity=24)
    other.forward([[11] * 20, [12] * 20])
    other.crop(0)  # which leaves bytes of sealed blocks behind
    other.forward(PROMPTS)
    other.forward([[11, 12], [13, 14]])
    other.crop([10, 2])  # the tokens that go were in tails
    for name, session in (("one", one), ("other", other)):
        session.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    # Of sealed blocks as many as there are.
    with safe_open(tmp_path / "one", framework="np") as file:
        assert file.get_tensor("past_key_values.0.key.packed").shape[2] == 8


def test_an_empty_state(model: Model, tmp_path: Path) -> None:
    Session(model, batch=2).save(tmp_path / "empty")
    session = reader(model)
    session.restore(tmp_path / "empty")
    assert session.lengths == (0, 0)


def require_refused(session: Session, path: Path, message: str) -> None:
    before = {name: array.copy() for name, array in session.tensors().items()}
    with pytest.raises(ValueError, match=message) as caught:
        session.restore(path)
    assert str(caught.value).startswith(str(path))
    assert session.lengths == (10, 2)
    for name, array in session.tensors().items():
        assert array.tobytes() == before[name].tobytes()


def test_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    other = Model(lookup_decoder.quantized(tmp_path, seed=1, context_length=40))
    reader(other).save(tmp_path / "state")
    require_refused(reader(model), tmp_path / "state", "a state of another model than")


def test_another_feedback_is_another_model(model: Model, tmp_path: Path) -> None:
    """It is told which layer's keys are coded with what (F1)."""
    models = [model]
    digests = [None]
    for seed in range(2):
        folder = tmp_path / f"feedback {seed}"
        folder.mkdir()
        feedback = lookup_decoder.some_feedback(seed)
        path = lookup_decoder.quantized(folder, context_length=40, feedback={1: feedback})
        models.append(Model(path))
        digests.append(feedback.digest)
    named = ["without feedback"] + [rf"with feedback {one:.12}\.\.\." for one in digests[1:]]
    for i, one in enumerate(models):
        reader(one).save(tmp_path / "state")
        for j, other in enumerate(models):
            session = reader(other)
            if i == j:
                session.crop(0)
                session.restore(tmp_path / "state")
                assert session.lengths == (10, 2)
                continue
            message = (
                f"another model than {re.escape(str(other.path))}: keys of layer 1 are coded "
                f"{named[i]} in the file, and {named[j]} in the model; take the model that it was"
            )
            require_refused(session, tmp_path / "state", message)


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    """Also where they lie in a file of their own, of equal length."""
    folders = [tmp_path / name for name in ("one", "other")]
    import onnx

    for seed, folder in enumerate(folders):
        folder.mkdir()
        path = lookup_decoder.quantized(folder, context_length=40)
        loaded = onnx.load(str(path))
        values = np.random.default_rng(seed).standard_normal(3000, dtype=np.float32)
        loaded.graph.initializer.append(onnx.numpy_helper.from_array(values, "unused"))
        onnx.save(
            loaded, str(path), save_as_external_data=True, location="weights.bin", size_threshold=99
        )
    assert (folders[0] / "quantized.onnx").read_bytes() == (
        folders[1] / "quantized.onnx"
    ).read_bytes()
    models = [Model(folder / "quantized.onnx") for folder in folders]
    reader(models[0]).save(tmp_path / "state")
    require_refused(reader(models[1]), tmp_path / "state", "another model")


def test_other_rows_and_too_many_tokens_are_refused(model: Model, tmp_path: Path) -> None:
    Session(model).save(tmp_path / "one")
    require_refused(reader(model), tmp_path / "one", "has 1 rows, and the session 2; make one with")
    long = reader(model)
    long.forward([[1] * 20, [2] * 3])
    long.save(tmp_path / "long")
    require_refused(reader(model, capacity=16), tmp_path / "long", "30 tokens, .* room for 16")


def changed(path: Path, change: str) -> None:
    """Write the state with something else in it, and a checksum that is right."""
    with safe_open(path, framework="np") as file:
        content = json.loads(file.metadata()["nsq"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = {k: v for k, v in content.items() if k not in ("format", "spec", "sha256")}
    name = "past_key_values.1.value.norm"
    if change == "shape":
        arrays[name] = arrays[name][:, :, :-1]
    elif change == "dtype":
        arrays[name] = arrays[name].astype(np.float32)
    elif change == "missing":
        del arrays[name]
    elif change == "more":
        arrays["mask"] = np.ones((2, 10), np.uint8)
    elif change == "lengths":
        content["lengths"] = [10, 11]
    elif change == "slots":
        content["slots"] = -1
    elif change == "feedback":
        content["key_feedback"] = [None, "ab"]
    elif change == "content":
        content["rows"] = 2
    containers.write_container(path, "nsq-session-1", content, arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"past_key_values\.1\.value\.norm is float16 \[2, 2, 7\], not float16"),
        ("dtype", r"past_key_values\.1\.value\.norm is float32"),
        ("missing", "is missing"),
        ("more", "'mask' does not belong there"),
        ("lengths", r"lengths\[1\]=11"),
        ("slots", "slots=-1"),
        ("feedback", "its metadata has .*key_feedback"),
        ("content", "its metadata has"),
    ],
)
def test_what_save_does_not_write_is_refused(
    model: Model, tmp_path: Path, change: str, message: str
) -> None:
    reader(model).save(tmp_path / "state")
    changed(tmp_path / "state", change)
    require_refused(reader(model), tmp_path / "state", message)


def test_damage_is_refused(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "state"
    reader(model).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    require_refused(reader(model), path, "does not match its checksum")
    path.write_bytes(whole[: len(whole) // 2])
    require_refused(reader(model), path, "damaged")
    save_file({"x": np.ones(3)}, path)
    require_refused(reader(model), path, "not a file of quantized arrays")
    with pytest.raises(FileNotFoundError):
        reader(model).restore(tmp_path / "missing")


def test_a_disk_that_is_full_leaves_what_was_there(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    reader(model).save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    session = reader(model)
    session.forward([[1], [2]])
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
