"""Tokens a second of onnxruntime-genai's own loop, with a cache in buffers and with its own.

Run as ``python -m benchmarks.genai [--json FILE]``. SmolLM2-135M is written as genai's model
builder writes a decoder: float32 weights, GroupQueryAttention, lengths from the mask. ``rewrite``
makes of that models with a cache in buffers, which genai's loop and ours both run. All take turns,
a step each; ratios are taken round by round. Needs onnxruntime-genai, which is in the extra
``test``, and 1 GB on disk.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai as genai

from benchmarks.decoding import CHUNK, Ids, text_of
from benchmarks.timing import (
    RATIOS,
    Case,
    Row,
    as_text,
    beside,
    interleaved,
    machine,
    parser,
    publish,
    spread,
)
from nsq_ref.scheme import SchemeName
from onnx_export.models.attention_forms import GroupedAttention
from onnx_export.models.built import DecoderConfig, build_onnx
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.sources import smollm2_gguf
from onnx_export.operators.cache_layout import KEY
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.schema import ELEMENTS
from onnx_export.rewrite import rewrite
from onnx_export.running import Model, Session

PEER = "genai, float32"
SCHEMES: tuple[SchemeName, ...] = ("streaming4", "streaming3")
TOKENS = [128, 4096]


def main() -> None:
    arguments = parser("genai", __doc__, threads=2, rounds=15)
    arguments.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = arguments.parse_args()
    tokens = sorted(options.tokens)
    room = max(tokens) + 3 * options.rounds * len(tokens)  # steps are among the tokens
    ids = text_of(room)
    rows: list[Row] = []
    processor: list[str] = []
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_original(folder / "original", room, options.threads)
        loops: dict[str, Loop] = {PEER: Generator(folder / "original", room)}
        for scheme in SCHEMES:
            model = folder / scheme / "model.onnx"
            rewrite(
                folder / "original/model.onnx", model, key=scheme, value=scheme, cache="buffers",
                context_length=room,
            )  # fmt: skip
            loops[f"genai, {scheme} in buffers"] = Generator(model.parent, room)
            loops[f"our loop, {scheme} in buffers"] = Ours(model, options.threads)
        for count in tokens:
            for loop in loops.values():
                loop.read(ids[:count])
            cases = [Case(name, loop.step) for name, loop in loops.items()]
            timed = interleaved(cases, options.rounds, settle=1e-9)  # one step before each
            for name, case in timed.items():
                what, speed = f"{name}, {count} tokens", spread(1 / case.seconds)
                rows.append(Row(what, speed, "tokens a second", spread(case.seconds)))
                taken = 1e3 * spread(case.processor_seconds).median
                processor.append(f"{what}: {taken:.1f} ms")
                if name != PEER:
                    rows.append(beside(what, timed[PEER], case, f"as fast as {PEER}"))
    notes = [
        f"onnxruntime {onnxruntime.__version__}, onnxruntime-genai {genai.__version__}, "
        f"SmolLM2-135M-Instruct with float32 weights, one row, {options.threads} threads, "
        f"{options.rounds} rounds, a step each in turn, greedy",
        "genai has one memory for past and present, of floats too",
        f"processor time of a step, threads that wait included: {'; '.join(processor)}",
        as_text(machine()),
        f"load average of the machine: {before:.1f} before, {os.getloadavg()[0]:.1f} after",
        RATIOS,
    ]
    publish(options, "onnxruntime-genai", rows, notes, threads=options.threads)


class Loop:
    """A loop that has read some tokens, and goes on from them."""

    def read(self, ids: Ids) -> None:
        """Go back to as many of these tokens as have been read, and read the others."""
        raise NotImplementedError

    def step(self) -> None:
        """Take the most likely token, and read it."""
        raise NotImplementedError


class Generator(Loop):
    """That of onnxruntime-genai."""

    def __init__(self, folder: Path, room: int) -> None:
        self.model = genai.Model(str(folder))
        params = genai.GeneratorParams(self.model)
        # Logits are of every token that is read at once.
        params.set_search_options(max_length=room, do_sample=False, chunk_size=CHUNK)
        self.generator = genai.Generator(self.model, params)
        self.given = 0

    def read(self, ids: Ids) -> None:
        """Go back to as many of these tokens as have been read, and read the others."""
        if self.given:
            self.generator.rewind_to(self.given)
        self.generator.append_tokens(ids[None, self.given :].astype(np.int32))
        self.given = len(ids)
        self.step()  # takes a token of what has been read; nothing is run

    def step(self) -> None:
        """Read the token before, and take the most likely one."""
        self.generator.generate_next_token()


class Ours(Loop):
    """That of `onnx_export.running`."""

    def __init__(self, model: Path, threads: int) -> None:
        self.session = Session(Model(model, threads=threads))
        self.given = 0

    def read(self, ids: Ids) -> None:
        """Go back to as many of these tokens as have been read, and read the others."""
        self.session.crop(self.given)
        for start in range(self.given, len(ids) - 1, CHUNK):
            self.session.forward(ids[start : min(start + CHUNK, len(ids) - 1)], num_logits=1)
        self.given = len(ids) - 1
        self.stream = self.session.stream(ids[-1:], 1 << 20)
        self.step()

    def step(self) -> None:
        """Read the token before, and take the most likely one."""
        next(self.stream)


def write_original(folder: Path, room: int, threads: int) -> None:
    """Write the model with a mask, and its configuration for genai."""
    config = build_onnx(GGUFFile(smollm2_gguf()), folder, attention=GroupedAttention())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    take_mask(model.graph)
    kept = [one for one in model.metadata_props if one.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "genai_config.json").write_text(json.dumps(settings(config, room, threads)))
    (folder / "tokenizer.json").write_text("{}")


def take_mask(graph: onnx.GraphProto) -> None:
    """Count tokens by a mask, as genai's model builder writes it."""
    add = Nodes()
    counted = add("ReduceSum", "attention_mask", [1], keepdims=0)
    add("Cast", add("Sub", counted, 1), to=ELEMENTS["int32"], name="last_positions")
    shape = add("Shape", "attention_mask")
    add("Cast", add("Gather", shape, 1, axis=0), to=ELEMENTS["int32"], name="total")
    made = {name for node in add.nodes for name in node.output}
    unused = {"real_lengths", "total_lengths", "last_positions.int64", "most_past", "total.int64"}
    others = [node for node in graph.node if not {*made, *unused} & set(node.output)]
    del graph.node[:]
    graph.node.extend([*add.nodes, *others])
    absent = {"past_lengths", "new_lengths", "num_logits"}  # the last keeps its default, all
    inputs = [one for one in graph.input if one.name not in absent]
    del graph.input[:]
    graph.input.extend(inputs)
    mask = onnx.helper.make_tensor_value_info(
        "attention_mask", ELEMENTS["int64"], ["batch", "total_sequence"]
    )
    graph.input.append(mask)


def settings(config: DecoderConfig, room: int, threads: int) -> dict[str, Any]:
    """Return what genai is told; no token ends a text."""
    return {
        "model": {
            "bos_token_id": 1, "eos_token_id": config.vocab_size - 1, "pad_token_id": 0,
            "type": "llama", "context_length": room, "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"intra_op_num_threads": threads, "provider_options": []},
                "filename": "model.onnx", "head_size": config.head_dim,
                "hidden_size": config.embedding_length,
                "inputs": {
                    "input_ids": "input_ids", "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.heads, "num_hidden_layers": config.layers,
                "num_key_value_heads": config.kv_heads,
            },
        },
        "search": {"do_sample": False, "max_length": room, "past_present_share_buffer": True},
    }  # fmt: skip


if __name__ == "__main__":
    main()
