"""onnxruntime-genai's own loop on rewritten models, beside ours on the cache of several tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime_genai as genai
import pytest

from nsq_ref import Scheme
from onnx_export.operators.cache_buffers import read_buffers
from onnx_export.operators.cache_layout import CacheLayout
from onnx_export.rewrite import rewrite
from onnx_export.running import Session
from tests.support.command import refused, said
from tests.support.exports import EXPORTS

CONTEXT = 200
SCHEMES = {
    "streaming4": {},
    "blocks of 8": {
        "key": Scheme(block_size=8, sink_tokens=2, symmetric=False),
        "value": Scheme(bits=3, block_size=16, separate_norm=False),
    },
}
PROMPT = np.random.default_rng(0).integers(3, 90, 150).tolist()


class Folders(NamedTuple):
    """What the model builder makes, for genai, and for our loop."""

    original: Path
    genai: Path
    ours: Path


def make(folder: Path, name: str, **options: Any) -> Folders:
    original = exported(folder, name)
    made = Folders(original, folder / "genai", folder / "ours")
    rewrite(original / "model.onnx", made.genai / "decoder.onnx", cache="buffers", **options)
    rewrite(original / "model.onnx", made.ours / "model.onnx", **options)
    return made


def exported(folder: Path, name: str) -> Path:
    """Put the configuration beside a fixture that the builder wrote beside its model."""
    original = folder / "original"
    original.mkdir()
    shutil.copy(EXPORTS / f"{name}.onnx", original / "model.onnx")
    graph = onnx.load(original / "model.onnx").graph
    inputs = {one.name for one in graph.input}
    vocab = graph.output[0].type.tensor_type.shape.dim[2].dim_value
    names = {one: one for one in ("input_ids", "attention_mask", "position_ids") if one in inputs}
    config = {
        "model": {
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "type": "llama",
            "context_length": CONTEXT, "vocab_size": vocab,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx", "head_size": 16, "hidden_size": 32,
                "inputs": names | {
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
                "sliding_window": {
                    "window_size": 8, "slide_key_value_cache": False, "slide_inputs": False,
                    "layers": [0], "cache_slack": 0,
                },
            },
        },
        "search": {
            "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True,
            "length_penalty": 1.0, "max_length": 4096, "min_length": 0, "no_repeat_ngram_size": 0,
            "num_beams": 1, "num_return_sequences": 1, "past_present_share_buffer": False,
            "repetition_penalty": 1.0, "temperature": 0.5, "top_k": 50, "top_p": 0.75,
        },
    }  # fmt: skip
    (original / "genai_config.json").write_text(json.dumps(config))
    (original / "tokenizer.json").write_text("{}")
    return original


def generator(folder: Path, rows: int = 1, **search: Any) -> genai.Generator:
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(batch_size=rows, **search)
    return genai.Generator(model, params)


def read(one: genai.Generator, ids: Sequence[Sequence[int]]) -> None:
    one.append_tokens(np.array(ids, np.int32))


def generate(one: genai.Generator, count: int) -> list[list[int]]:
    """Return new tokens, by row."""
    made = []
    for _ in range(count):
        one.generate_next_token()
        made.append(one.get_next_tokens().tolist())
    return np.array(made).T.tolist()  # type: ignore[no-any-return]


def ours(session: Session, ids: Sequence[int], count: int) -> list[int]:
    (text,) = session.generate(ids, count)
    return text.tokens.tolist()  # type: ignore[no-any-return]


def require_same_bytes(one: genai.Generator, session: Session) -> None:
    """Every stored part of every layer that tokens are in, K1 B1."""
    layout, tensors = session.model.layout, session.tensors()
    (length,) = session.lengths
    compared = 0
    for tensor in layout.tensors:
        assert tensor.part is not None
        assert tensor.layer is not None
        side, _, part = tensor.part.partition("_")
        pair = layout.schemes[tensor.layer]
        assert pair is not None
        scheme = getattr(pair, side)
        theirs = tensors[tensor.past]
        head_dim = tensors[f"past_key_values.{tensor.layer}.{side}.tail"].shape[-1]
        buffers = one.get_output(f"present.{tensor.layer}.{side}")
        lengths, parts = read_buffers(buffers, scheme, head_dim=head_dim)
        assert lengths.tolist() == [length]
        sinks, sealed, tail = scheme.cut(length)
        rows = {"sinks": sinks, "tail": tail}.get(part, sealed)
        if part in ("scale", "zero"):
            rows = sealed // scheme.block_size
        assert parts[part][:, :, :rows].tobytes() == theirs[:, :, :rows].tobytes(), tensor.past
        compared += rows
    assert compared > 0


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=list(SCHEMES))
@pytest.mark.parametrize(
    "name", ["genai-llama-cpu-fp32", "genai-qwen3-cpu-fp32", "genai-gemma2-cpu-fp32"]
)
def test_its_own_loop_generates_what_ours_does(
    name: str, schemes: dict[str, Any], tmp_path: Path
) -> None:
    """A long prompt, another after it, tokens that are taken back: tokens and stored bytes."""
    folders = make(tmp_path, name, **schemes)
    one, session = generator(folders.genai), Session(folders.ours / "model.onnx", capacity=CONTEXT)
    read(one, [PROMPT])
    text = ours(session, PROMPT, 6)
    assert generate(one, 6) == [text]
    require_same_bytes(one, session)
    for kept in (len(PROMPT) + 2, 140, 37, 1):
        one.rewind_to(kept)
        session.crop(kept)
        read(one, [[11, 12, 13]])
        assert generate(one, 3) == [ours(session, [11, 12, 13], 3)], kept
        require_same_bytes(one, session)


def test_a_second_turn_begins_with_the_last_token_of_the_first(tmp_path: Path) -> None:
    """Which genai 0.18 has not read: a cache of floats has zeros there, ours refuses."""
    folders = make(tmp_path, "genai-llama-cpu-fp32", **SCHEMES["blocks of 8"])
    one, session = generator(folders.genai), Session(folders.ours / "model.onnx", capacity=CONTEXT)
    read(one, [PROMPT])
    (text,) = generate(one, 6)
    count = one.token_count()
    with pytest.raises(RuntimeError, match=r"past_lengths\[0\] is 156; past_key and past_value "):
        read(one, [[11, 12, 13]])
    # Not a token is missing of what was told: each fed as it came.
    session.forward([PROMPT])
    for token in text[:-1]:
        session.forward([[token]])
    for turn in ([11, 12, 13], [14], list(range(20, 31))):
        one.rewind_to(count - 1)
        again = [text[-1], *turn]
        read(one, [again])
        (answer,) = generate(one, 4)
        assert answer == ours(session, again, 4), turn
        require_same_bytes(one, session)
        text, count = answer, one.token_count()


def test_a_prompt_in_several_chunks(tmp_path: Path) -> None:
    folders = make(tmp_path, "genai-llama-cpu-fp32", **SCHEMES["blocks of 8"])
    one = generator(folders.genai, chunk_size=40)
    session = Session(folders.ours / "model.onnx", capacity=CONTEXT)
    read(one, [PROMPT])
    for first in range(0, 120, 40):
        session.forward([PROMPT[first : first + 40]])
    assert generate(one, 5) == [ours(session, PROMPT[120:], 5)]
    require_same_bytes(one, session)


def test_rows_of_a_batch_are_each_as_alone(tmp_path: Path) -> None:
    """The shorter prompt is padded on the right, as genai does it."""
    folders = make(tmp_path, "genai-llama-cpu-fp32", **SCHEMES["blocks of 8"])
    prompts = [PROMPT[:60], PROMPT[60:83]]
    padded = [one + [0] * (60 - len(one)) for one in prompts]
    both = generator(folders.genai, rows=2)
    read(both, padded)
    found = generate(both, 20)
    for prompt, tokens in zip(prompts, found, strict=True):
        session = Session(folders.ours / "model.onnx", capacity=CONTEXT)
        assert ours(session, prompt, 20) == tokens


def test_its_loop_fills_the_context_and_stops(tmp_path: Path) -> None:
    """Less than the model's own, whose buffers have room for just that."""
    folders = make(tmp_path, "genai-llama-cpu-fp32")
    target = tmp_path / "short" / "model.onnx"
    rewrite(folders.original / "model.onnx", target, cache="buffers", context_length=160)
    one = generator(target.parent)
    read(one, [PROMPT])
    while not one.is_done():
        one.generate_next_token()
    assert one.token_count() == 160
    assert one.get_sequence(0)[150:].tolist() == ours(
        Session(folders.ours / "model.onnx", capacity=CONTEXT), PROMPT, 10
    )
    with pytest.raises(RuntimeError, match="cannot be greater than model context_length"):
        generator(target.parent, max_length=161)
    with pytest.raises(RuntimeError, match="Beam search"):
        generator(target.parent, num_beams=2, max_length=100)


def test_our_loop_runs_buffers_too(tmp_path: Path) -> None:
    folders = make(tmp_path, "genai-llama-cpu-fp32", **SCHEMES["blocks of 8"])
    buffers = Session(folders.genai / "decoder.onnx")
    tensors = Session(folders.ours / "model.onnx", capacity=CONTEXT)
    assert ours(buffers, PROMPT, 9) == ours(tensors, PROMPT, 9)
    buffers.save(tmp_path / "state")
    fork = buffers.fork()
    for session in (buffers, tensors):
        session.crop(45)
    assert ours(buffers, [4, 5], 20) == ours(tensors, [4, 5], 20)
    with pytest.raises(ValueError, match="is a buffer, whose bytes its operator alone knows"):
        buffers.pretend(9)
    assert ours(buffers, [6], 9) == ours(tensors, [6], 9)
    again = ours(fork, [1], 3)
    buffers.restore(tmp_path / "state")
    assert ours(buffers, [1], 3) == again
    assert buffers.memory().parts == {"buffer": buffers.memory().used}
    with pytest.raises(ValueError, match="only the native library runs"):
        Session(folders.genai / "decoder.onnx", library=False)


def test_an_optional_input_keeps_its_default(tmp_path: Path) -> None:
    folder = exported(tmp_path, "genai-llama-cpu-fp32")
    model = onnx.load(folder / "model.onnx")
    (last,) = [node for node in model.graph.node if "logits" in node.output]
    last.output[list(last.output).index("logits")] = "unscaled"
    model.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "factor"], ["logits"]))
    kind = model.graph.output[0].type.tensor_type.elem_type
    model.graph.initializer.append(onnx.helper.make_tensor("factor", kind, [], [-1]))
    model.graph.input.append(onnx.helper.make_tensor_value_info("factor", kind, []))
    onnx.save(model, folder / "model.onnx")
    rewrite(folder / "model.onnx", tmp_path / "new" / "decoder.onnx", cache="buffers")
    rewrite(folder / "model.onnx", tmp_path / "ours" / "model.onnx")
    one = generator(tmp_path / "new", max_length=100)
    read(one, [PROMPT[:20]])
    found = generate(one, 9)
    assert found == [ours(Session(tmp_path / "ours" / "model.onnx", capacity=99), PROMPT[:20], 9)]


def test_the_folder_is_what_genai_wants(tmp_path: Path) -> None:
    folders = make(tmp_path, "genai-llama-cpu-fp32", key="streaming4", value="streaming3")
    before = json.loads((folders.original / "genai_config.json").read_text())
    after = json.loads((folders.genai / "genai_config.json").read_text())
    names = {path.name for path in folders.genai.iterdir()}
    library = after["model"]["decoder"]["session_options"].pop("custom_ops_library")
    assert names == {"decoder.onnx", "genai_config.json", "tokenizer.json", library}
    # All else stays.
    before["model"]["decoder"]["filename"] = "decoder.onnx"
    del before["model"]["decoder"]["sliding_window"]
    before["search"] |= {"max_length": CONTEXT, "past_present_share_buffer": True}
    assert after == before
    model = onnx.load(folders.genai / "decoder.onnx")
    assert not model.functions
    layout = CacheLayout.from_metadata({one.key: one.value for one in model.metadata_props})
    assert layout.context_length == CONTEXT
    assert {tensor.part for tensor in layout.tensors} == {"key", "value"}
    assert len({tensor.shape for tensor in layout.tensors}) == 1


def test_the_command_makes_a_folder_that_genai_runs(tmp_path: Path) -> None:
    original = exported(tmp_path, "genai-gemma2-cpu-fp32")
    made = tmp_path / "made" / "model.onnx"
    command = ("onnx", "rewrite", original / "model.onnx", made, "--cache", "buffers")
    command += ("--scheme", "streaming3", "--context", 170)
    text = said(*command)
    assert "rewritten: 2 of 2 attentions" in text
    assert str(made.with_name("genai_config.json")) in text
    before, after = (
        json.loads((path / "genai_config.json").read_text()) for path in (original, made.parent)
    )
    changed = {"max_length": 170, "past_present_share_buffer": True}
    assert after["search"] == before["search"] | changed
    assert after["model"].keys() == before["model"].keys()
    one = generator(made.parent)
    read(one, [PROMPT])
    rewrite(
        original / "model.onnx", tmp_path / "tensors.onnx", key="streaming3", value="streaming3"
    )
    session = Session(tmp_path / "tensors.onnx", capacity=CONTEXT)
    assert generate(one, 20) == [ours(session, PROMPT, 20)]
    assert "exists; choose another name" in refused(*command, cwd=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", 64), "context_length is of buffers"),
        (("--cache", "buffers", "--context", 0), "context_length=0 must be an integer"),
        (("--cache", "buffers", "--context", -5), "context_length=-5 must be an integer"),
        (("--cache", "buffers", "--context", 201), "context_length=201; the model has 200 pos"),
        (("--cache", "buffers", "--context", "many"), "Invalid value for '--context'"),
        (("--cache", "blobs"), "'blobs' is not one of"),
        (("--cache", "buffers", "--row-lengths"), "does not feed; take cache='tensors'"),
        (("--cache", "buffers", "--scheme", "nsep+pchan4"), "block"),
    ],
)
def test_bad_options_are_refused_in_a_line(
    options: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    """And nothing is written."""
    original = exported(tmp_path, "genai-llama-cpu-fp32")
    command = ("onnx", "rewrite", original / "model.onnx", tmp_path / "new" / "model.onnx")
    before = sorted(tmp_path.rglob("*"))
    assert message in said(*command, *options, code=2)
    assert sorted(tmp_path.rglob("*")) == before


def change(folder: Path, *path: str, value: Any) -> None:
    """Set an entry of the configuration."""
    file = folder / "genai_config.json"
    config = entry = json.loads(file.read_text())
    for name in path[:-1]:
        entry = entry[name]
    entry[path[-1]] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "options", "message"),
    [
        (("model",), 1, {}, "has no object 'model'"),
        (("model", "decoder"), [], {}, "has no object 'decoder'"),
        (("search",), [], {}, "'search' is no object"),
        (("search", "max_length"), "many", {}, "max_length"),
        (("model", "decoder", "session_options"), [], {}, "'session_options' is no object"),
        (("model", "context_length"), "many", {}, "context_length"),
        (("model", "context_length"), 0, {}, "context_length"),
        (("search",), {}, {"context_length": 0}, "context_length=0 must be an integer"),
        (("search",), {}, {"context_length": 9999}, "context_length=9999; the model has 200"),
        (("search",), {}, {"policy": {"layers": {"0": None}}}, "all caches one dtype"),
        (("search",), {}, {"row_lengths": True}, "'past_lengths', which onnxruntime-genai does"),
        (
            ("model", "decoder", "session_options", "provider_options"), [{"cuda": {}}], {},
            "asks for the provider cuda",
        ),
    ],
)  # fmt: skip
def test_what_genai_could_not_run_is_refused(
    path: tuple[str, ...], value: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """And nothing is written."""
    original = exported(tmp_path, "genai-llama-cpu-fp32")
    change(original, *path, value=value)
    with pytest.raises((ValueError, TypeError), match=message):
        rewrite(original / "model.onnx", tmp_path / "new/model.onnx", cache="buffers", **options)
    assert not (tmp_path / "new").exists()


def test_configuration_that_is_no_json_is_refused(tmp_path: Path) -> None:
    original = exported(tmp_path, "genai-llama-cpu-fp32")
    for text, message in (("{", "is no JSON"), ("[]", "it is no object")):
        (original / "genai_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            rewrite(original / "model.onnx", tmp_path / "new/model.onnx", cache="buffers")


def test_the_models_own_configuration_stays(tmp_path: Path) -> None:
    original = exported(tmp_path, "genai-llama-cpu-fp32")
    with pytest.raises(ValueError, match="write into another folder"):
        rewrite(original / "model.onnx", original / "quantized.onnx", cache="buffers")


def test_without_a_configuration_the_context_is_the_models(tmp_path: Path) -> None:
    """Of its rotations; without any it must be said."""
    source, target = EXPORTS / "genai-llama-cpu-fp32.onnx", tmp_path / "model.onnx"
    rewrite(source, target, cache="buffers")
    metadata = {one.key: one.value for one in onnx.load(target).metadata_props}
    known = CacheLayout.from_metadata(metadata).context_length
    rotations = [
        one.dims[0] for one in onnx.load(source).graph.initializer if one.name == "cos_cache"
    ]
    assert [known] == rotations
    learned = EXPORTS / "optimum-llama-18.onnx"
    with pytest.raises(ValueError, match="give context_length"):
        rewrite(learned, tmp_path / "other.onnx", cache="buffers")
    rewrite(learned, tmp_path / "other.onnx", cache="buffers", context_length=64)
    session = Session(tmp_path / "other.onnx")
    rewrite(learned, tmp_path / "third.onnx")
    other = Session(tmp_path / "third.onnx", capacity=64)
    assert ours(session, PROMPT[:30], 8) == ours(other, PROMPT[:30], 8)


def test_options_of_buffers_are_theirs(tmp_path: Path) -> None:
    source = EXPORTS / "genai-llama-cpu-fp32.onnx"
    for options in ({"cache": "blobs"}, {"context_length": 9}):
        with pytest.raises(ValueError, match="context_length is of buffers"):
            rewrite(source, tmp_path / "model.onnx", **options)  # type: ignore[arg-type]
