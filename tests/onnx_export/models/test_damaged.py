"""GGUF files in which bytes were changed or lost: built as ever, or refused in one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsq_ref import Scheme
from onnx_export.models.attention_forms import PlainAttention, QuantizedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.json_tokenizer import tokenizer_files
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer

SCHEME = Scheme.named("streaming4")
FORMS = (PlainAttention(), QuantizedAttention(SCHEME, SCHEME))
BYTES = st.sampled_from([0, 1, 2, 4, 7, 8, 9, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("whole"))


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_damage_is_one_line(whole: Path, data: st.DataObject) -> None:
    """Near keys, where types and counts are, and anywhere; the tokenizer's part too."""
    content = bytearray(whole.read_bytes())
    header = GGUFFile(whole).tensors["token_embd.weight"].start
    keys = [one.start() for one in re.finditer(rb"(llama|general|tokenizer)\.", content[:header])]
    near = st.builds(lambda key, more: key + more, st.sampled_from(keys), st.integers(0, 70))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(near | st.integers(0, header - 1))] = data.draw(BYTES)
    if data.draw(st.integers(0, 9)) == 0:
        content = content[: data.draw(st.integers(0, len(content)))]
    folder = whole.with_name("damaged")
    folder.mkdir()
    try:
        path, out = folder / "model.gguf", folder / "out"
        path.write_bytes(content)
        try:
            file = GGUFFile(path)
            files = tokenizer_files(Tokenizer(path))
            build_onnx(file, out, attention=data.draw(st.sampled_from(FORMS)), beside=files)
        except ValueError as error:
            said = str(error)
        else:
            said = ""
        if said:
            assert said.count("\n") == 0
            assert not out.exists()
        else:
            names = {one.name for one in out.iterdir()}
            assert names >= {"model.onnx", "weights.bin", "tokenizer.json", "SHA256SUMS"}
    finally:
        shutil.rmtree(folder)
