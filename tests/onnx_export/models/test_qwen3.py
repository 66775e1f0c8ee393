"""Qwen3, whose queries and keys are normalized head by head, in every form of attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from nsq_ref import Scheme
from onnx_export.models.attention_forms import (
    AttentionForm,
    GroupedAttention,
    PlainAttention,
    QuantizedAttention,
)
from onnx_export.models.built import cached_onnx
from onnx_export.models.config import read_config
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.json_tokenizer import read_tokenizer
from onnx_export.models.tiny import tiny_gguf
from onnx_export.rewrite.opset import require_raisable
from onnx_export.running import Model, Session
from tests.support.command import nsq, said
from tests.support.llama_oracle import IDS, TinyModel, write_gguf

TINY = TinyModel("qwen3", head_dim=16, explicit_head_dim=True)
# Blocks longer than the context: nothing is sealed, and the cache is what was computed.
UNSEALED = replace(Scheme.named("streaming4"), block_size=64)
FORMS: dict[str, AttentionForm] = {
    "plain": PlainAttention(),
    "gqa": GroupedAttention(),
    "nsq": QuantizedAttention(UNSEALED, UNSEALED),
}
NEWER = QuantizedAttention(UNSEALED, UNSEALED, opset=24)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_an_independent_forward_pass(form: str, tmp_path: Path) -> None:
    path = TINY.write(tmp_path / "tiny.gguf")
    model = Model(cached_onnx(path, cache_dir=tmp_path, attention=FORMS[form]))
    session = Session(model)
    expected, _, _ = TINY.forward(IDS)
    for start, stop in ((0, 12), (12, 13)):
        logits = session.forward(IDS[start:stop], num_logits=None)
        assert np.abs(logits[0] - expected[start:stop]).max() < 1e-5 * np.abs(expected).max()
    (found,) = Session(model).generate(IDS, 6)
    text = list(IDS)
    for token in found.tokens:
        assert token == TINY.forward(text)[0][-1].argmax()
        text.append(int(token))


@pytest.mark.parametrize("library", [True, False])
def test_opset_24_has_the_body_that_appends_in_place(library: bool, tmp_path: Path) -> None:
    path = TINY.write(tmp_path / "tiny.gguf")
    built = [
        onnx.load(cached_onnx(path, cache_dir=tmp_path, attention=form), load_external_data=False)
        for form in (FORMS["nsq"], NEWER)
    ]
    require_raisable(built[0], 24)  # whose own nodes mean the same there
    assert [one.version for one in built[1].opset_import if not one.domain] == [24]
    (body,) = [one for one in built[1].functions if one.name == "Attention"]
    assert "TensorScatter" in {node.op_type for node in body.node}
    file = cached_onnx(path, cache_dir=tmp_path, attention=NEWER)
    session = Session(Model(file, library=library))
    expected, _, _ = TINY.forward(IDS)
    for start, stop in ((0, 12), (12, 13)):
        logits = session.forward(IDS[start:stop], num_logits=None)
        assert np.abs(logits[0] - expected[start:stop]).max() < 1e-5 * np.abs(expected).max()


def test_the_oracle_tells_norms_apart() -> None:
    """The norm of each side changes logits beyond the tolerance."""
    base, _, _ = TINY.forward(IDS)
    for side in "qk":
        other = replace(TINY, weights={})
        for layer in range(TINY.layers):
            other.weights[f"blk.{layer}.attn_{side}_norm.weight"][:] = 1
        assert np.abs(other.forward(IDS)[0] - base).max() > 1e-2


@pytest.mark.parametrize("name", ["blk.1.attn_q_norm.weight", "blk.0.attn_k_norm.weight"])
def test_norms_that_are_missing_or_of_another_width_are_named(name: str, tmp_path: Path) -> None:
    tensors = TINY.tensors()
    values = tensors.pop(name)
    path = write_gguf(tmp_path / "model.gguf", "qwen3", TINY.keys(), tensors)
    with pytest.raises(ValueError, match=rf"model\.gguf: tensor '{name}' is missing"):
        read_config(GGUFFile(path))
    tensors[name] = np.tile(values, TINY.kv_heads)
    write_gguf(path, "qwen3", TINY.keys(), tensors)
    with pytest.raises(ValueError, match=rf"'{name}' must have shape \(16,\), got \(32,\)"):
        read_config(GGUFFile(path))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_built_and_run_on_the_command_line(form: str, tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path, "qwen3")
    model = said("onnx", "build", gguf, tmp_path / "out", "--attention", form).strip()
    tokenizer = read_tokenizer(gguf)
    ids = tokenizer.encode("on the 1945")
    (text,) = Session(model).generate(ids, 5, stop_tokens=tokenizer.stop_tokens)
    printed = said("onnx", "run", model, "on the 1945", "--tokens", 5)
    assert printed == tokenizer.decode([*ids, *text.tokens]) + "\n"
    again = ("onnx", "build", gguf, tmp_path / "newer", "--attention", form, "--opset")
    if form != "nsq":
        assert "--opset is of --attention nsq" in nsq(*again, 24, code=2).stderr
        return
    for opset in (20, 25):
        message = f"opset={opset} must be an integer from 21 to 24"
        assert message in nsq(*again, opset, code=2).stderr
    said(*again, 24)
    assert said("onnx", "run", tmp_path / "newer", "on the 1945", "--tokens", 5) == printed
