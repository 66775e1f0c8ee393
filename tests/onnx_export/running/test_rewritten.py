"""What the rewriter wrote, in the loop: the tokens of the original, which is run by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from onnx_export.models.json_tokenizer import JsonTokenizer
from onnx_export.rewrite import rewrite
from onnx_export.running import Session
from tests.support.command import nsq, refused, said
from tests.support.exports import EXPORTS, VOCABULARY, Floats

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


def write_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Write a tokenizer of single characters, padded and cut as some exports leave it."""
    vocabulary = {"<s>": 0, "</s>": 1, "<u>": 2}
    vocabulary |= {letter: 3 + index for index, letter in enumerate("abcdefghijklmnop ")}
    vocabulary |= {f"<{index}>": index for index in range(len(vocabulary), VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("genai-qwen3-cpu-fp32", ("genai_config.json", {"model": {"eos_token_id": [1]}})),
        ("optimum-llama-18", ("config.json", {"max_position_embeddings": 64, "eos_token_id": 1})),
        (
            "dynamo-gemma3-18-sdpa",
            ("config.json", {"text_config": {"max_position_embeddings": 64}}),
        ),
    ],
)
def test_a_folder_with_a_rewritten_model_runs(
    name: str, config: tuple[str, object], tmp_path: Path
) -> None:
    """`nsq onnx run` with what exporters put beside a model."""
    write_tokenizer(tmp_path)
    said("onnx", "rewrite", EXPORTS / f"{name}.onnx", tmp_path / "model.onnx")
    words = JsonTokenizer(tmp_path / "tokenizer.json")
    if name != "genai-qwen3-cpu-fp32":  # which has tables, and so an end
        assert "give --capacity" in refused("onnx", "run", tmp_path, "a", cwd=tmp_path)
    (tmp_path / config[0]).write_text(json.dumps(config[1]))
    ids = words.encode("a dog in a bag")
    assert len(ids) == 14
    done = nsq("onnx", "run", tmp_path, "a dog in a bag", "--tokens", NEW)
    assert done.stdout == words.decode([*ids, *greedy(name, ids.tolist())]) + "\n"
