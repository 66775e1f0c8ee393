"""Models that are not as their metadata says, and what they are fed otherwise."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest

from onnx_export.models.built import cached_onnx
from onnx_export.models.tiny import tiny_gguf
from onnx_export.running import Model, Session
from tests.support import lookup_decoder
from tests.support.lookup_decoder import changed_metadata

CHANGES = {
    "an input that is not there": ('"input_ids": "ids"', '"input_ids": "id"', "there is no 'id'"),
    "no input": ('"input_ids": "ids"', '"num_logits": "ids"', "names no input_ids"),
    "no logits": ('"logits": "scores"', '"present_lengths": "scores"', "names no logits"),
    "an output as input": ('"input_ids": "ids"', '"input_ids": "present.0.key.tail"', "twice"),
    "floats as lengths": (
        '"past_lengths": "past"',
        '"past_lengths": "past_key_values.0.key.tail"',
        "twice",
    ),
    "an input without a role": (', "new_lengths": "new"', "", "what input 'new' is for"),
    "no such cache": ("present.1.key.norm", "present.7.key.norm", "which the metadata has in the"),
    "another dtype": ('"dtype": "uint8"', '"dtype": "int8"', "is uint8; the metadata has int8"),
    "a later version": ('"version": 1', '"version": 2', "update nsq"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_that_is_wrong(tmp_path: Path, name: str) -> None:
    old, new, message = CHANGES[name]
    path = changed_metadata(lookup_decoder.quantized(tmp_path), old, new)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Model(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_such_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no ONNX model"):
        Model(tmp_path / "missing.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"model\.onnx: .*INVALID_PROTOBUF"):
        Model(path)
    with pytest.raises(ValueError, match="is a GGUF model, not an ONNX model"):
        Model(tiny_gguf(tmp_path))
    plain = onnx.load(str(lookup_decoder.quantized(tmp_path)))
    del plain.metadata_props[:]
    path.write_bytes(plain.SerializeToString())
    with pytest.raises(ValueError, match=r"has no metadata 'nsq\.cache'"):
        Model(path)


def test_a_model_whose_weights_are_missing(tmp_path: Path) -> None:
    path = cached_onnx(tiny_gguf(tmp_path), cache_dir=tmp_path)
    path.with_name("weights.bin").unlink()
    with pytest.raises(ValueError, match=r"model\.onnx: .*weights\.bin"):
        Model(path)


def test_sessions_that_cannot_be(tmp_path: Path) -> None:
    path = lookup_decoder.quantized(tmp_path)  # which says nothing of its context
    with pytest.raises(ValueError, match="does not say how long its context is; give a capacity"):
        Session(path)
    with pytest.raises(ValueError, match="capacity=0"):
        Session(path, capacity=0)
    with pytest.raises(ValueError, match="batch=0"):
        Session(path, capacity=8, batch=0)
    with pytest.raises(ValueError, match="threads=2 is for a path"):
        Session(Model(path), capacity=8, threads=2)


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missed where a cache is quantized, and nowhere else."""
    monkeypatch.setenv("NSQ_CUSTOM_OPS", str(tmp_path / "nowhere.so"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.so"):
        Model(lookup_decoder.quantized(tmp_path))
    assert not Model(lookup_decoder.quantized(tmp_path), library=False).in_place
    assert Model(lookup_decoder.masked(tmp_path)).in_place


def test_rows_that_are_equally_long_need_no_new_lengths(tmp_path: Path) -> None:
    """Lengths alone: rows have places apart, and all take as many tokens."""
    path = lookup_decoder.quantized(tmp_path, context_length=40, new_lengths=False)
    session = Session(path, batch=2)
    assert session.model.padding is None
    session.forward([[1, 2, 3], [4, 5, 6]])
    session.crop([3, 1])
    found = session.forward([[7], [8]])
    for row, prompt in enumerate(([1, 2, 3, 7], [4, 8])):
        assert abs(found[row] - Session(path).forward(prompt)[0]).max() < 1e-4
    with pytest.raises(ValueError, match=r"rows of \[2, 1\] tokens"):
        session.forward([[1, 2], [3]])


def test_a_model_that_counts_a_mask_is_padded_on_the_right(tmp_path: Path) -> None:
    """As rewritten GroupQueryAttention does: only rows without a past read fewer tokens."""
    path = lookup_decoder.quantized(tmp_path, context_length=20, counted=True)
    session = Session(path, batch=2)
    assert (session.model.padding, session.model.skips_rows) == ("right", False)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [4]]
    (tmp_path / "lengths").mkdir()
    lengths = lookup_decoder.quantized(tmp_path / "lengths", context_length=20)
    twin = Session(lengths, batch=2)
    found, expected = session.generate(prompts, 12), twin.generate(prompts, 12)
    assert [text.tokens.tolist() for text in found] == [text.tokens.tolist() for text in expected]
    for one in (session, twin):
        one.crop([5, 1])
    rows = [[6], [7]]
    assert abs(session.forward(rows) - twin.forward(rows)).max() < 1e-4
    for name, array in session.tensors().items():
        if name.endswith("tail"):
            assert array[0, :, :1].tobytes() == twin.tensors()[name][0, :, :1].tobytes()
    with pytest.raises(ValueError, match="row 1 has 2 tokens and reads 1, others 2"):
        session.forward([[1, 2], [3]])
    assert session.lengths == (6, 2)
    # Rows that have ended read on, so that all end where one of them has no room.
    session.crop(0)
    first, second = session.generate(prompts, 100)
    assert (len(first.tokens), first.ended_by) == (12, "context_length")
    assert (len(second.tokens), second.ended_by) == (12, "context_length")
    assert session.lengths == (20, 12)
