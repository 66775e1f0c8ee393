"""What the rewriter wrote, in the loop: the tokens of the original, which is run by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_export.rewrite import rewrite
from onnx_export.running import Session
from tests.support.exports import EXPORTS, Floats

# One of each way to tell lengths: a mask that is counted, the extent of the past with a mask and
# without, lengths as inputs.
FIXTURES = (
    "genai-qwen3-cpu-fp32", "genai-gemma2-cpu-fp32", "optimum-llama-18", "dynamo-llama-24-sdpa",
    "dynamo-gemma3-18-sdpa", "mobius-qwen3-default", "mobius-llama-static",
)  # fmt: skip
PROMPT = [5, 40, 9, 77, 23, 61]
NEW = 5


def greedy(name: str, prompt: list[int]) -> list[int]:
    """Continue a text with the model as it was exported."""
    original, ids, length, tokens = Floats(EXPORTS / f"{name}.onnx", 1), prompt, 0, []
    for _ in range(NEW):
        new = len(ids)
        length += new
        logits = original.step(
            {
                "input_ids": np.array([ids]),
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.arange(length - new, length)[None],
                "write_indices": np.array([length - new]),
                "nonpad_kv_seqlen": np.array([length]),
            }
        )
        ids = [int(logits[0, -1].argmax())]
        tokens += ids
    return tokens


@pytest.mark.parametrize("name", FIXTURES)
def test_the_loop_gives_the_tokens_of_the_original(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    rewrite(EXPORTS / f"{name}.onnx", path)
    session = Session(path, capacity=64)
    (text,) = session.generate(PROMPT, NEW)
    assert text.tokens.tolist() == greedy(name, PROMPT)
    session.crop(len(PROMPT) - 1)
    assert session.generate([PROMPT[-1]], NEW)[0].tokens.tolist() == text.tokens.tolist()


@pytest.mark.parametrize(
    "name", ["genai-qwen3-cpu-fp32", "optimum-llama-18", "mobius-llama-static"]
)
def test_rows_of_a_batch_are_each_as_alone(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    rewrite(EXPORTS / f"{name}.onnx", path, row_lengths=True)
    prompts = [PROMPT, PROMPT[:2], PROMPT[1:5]]
    texts = Session(path, capacity=64, batch=3).generate(prompts, NEW)
    assert [text.tokens.tolist() for text in texts] == [greedy(name, one) for one in prompts]
