"""What a cache takes of the machine, beside its arithmetic; on Linux, which tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsq_ref import Scheme
from onnx_export.evaluation import resident
from onnx_export.models.attention_forms import AttentionForm, GroupedAttention, QuantizedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.tiny import tiny_gguf
from onnx_export.running import Model, Session

STREAMING = Scheme.named("streaming4")
FORMS = (GroupedAttention(), QuantizedAttention(STREAMING, STREAMING))
PAGE = 4096
TOKENS = 1 << 17  # of which a tensor is memory of its own, that nothing used before


@pytest.mark.parametrize("form", FORMS)
def test_a_filled_cache_is_in_memory_to_a_page_a_tensor(
    form: AttentionForm, tmp_path: Path
) -> None:
    """Also where the process has freed memory before, which the allocator gives again."""
    build_onnx(GGUFFile(tiny_gguf(tmp_path, "qwen3")), tmp_path, attention=form)
    model = Model(tmp_path / "model.onnx")
    for _ in range(3):
        session = Session(model, capacity=TOKENS)
        session.pretend(TOKENS)
        used, taken = session.memory().used, resident.resident_cache(session)
        assert taken is not None
        assert used <= taken
        assert taken <= used + 2 * PAGE * len(model.layout.tensors)


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_onnx(GGUFFile(tiny_gguf(tmp_path, "qwen3")), tmp_path, attention=FORMS[0])
    for name in ("_ROLLUP", "_PAGEMAP"):
        monkeypatch.setattr(resident, name, tmp_path / "nowhere")
    assert resident.resident_bytes() is None
    assert resident.resident_cache(Session(tmp_path / "model.onnx", capacity=512)) is None
