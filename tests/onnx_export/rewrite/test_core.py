"""What a rewrite changes, and what not."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nsq_ref as nsq
from onnx_export.operators.cache_layout import CacheLayout, CacheTensor
from onnx_export.rewrite import rewrite
from tests.support.exported import Decoder, Graph, Original, Rewritten, gqa_model, save

Change = Callable[[Graph], None]


def same_logits(path: Path, out: Path, batch: int = 1, atol: float = 1e-5) -> Rewritten:
    """Compare a prompt and two tokens."""
    original, rewritten = Original(path, batch), Rewritten(out, batch, native=True)
    rng, length = np.random.default_rng(5), 0
    for width in (6, 1, 1):
        length += width
        feeds = {
            "input_ids": rng.integers(0, 17, (batch, width)),
            "attention_mask": np.ones((batch, length), np.int64),
        }
        want, got = original.step(feeds), rewritten.step(feeds)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    return rewritten


def test_all_else_is_the_same_in_every_byte(tmp_path: Path) -> None:
    model = gqa_model(Decoder(packed=False, qk_norm=True))
    model.graph.doc_string, model.doc_string, model.model_version = "a graph", "a model", 7
    model.graph.node[0].doc_string = "first"
    path, out = save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    report = rewrite(path, out)
    old, new = onnx.load(path), onnx.load(out)
    gone = {"GroupQueryAttention"}
    kept = [
        one.SerializeToString()
        for one in old.graph.node
        if one.op_type not in gone and one.name not in report.removed
    ]
    added = [one for one in new.graph.node if one.SerializeToString() not in kept]
    assert all(name.startswith("nsq_") for one in added for name in one.output if "." not in name)
    assert [one.SerializeToString() for one in new.graph.node if one not in added] == kept
    gone = {"index"}  # of the length of the mask, which only the old attention read
    assert [one.SerializeToString() for one in new.graph.initializer] == [
        one.SerializeToString() for one in old.graph.initializer if one.name not in gone
    ]
    assert [one for one in new.graph.input if "past" not in one.name] == list(old.graph.input)[:2]
    assert new.graph.output[0] == old.graph.output[0]
    assert new.metadata_props[0] == old.metadata_props[0]
    for field in ("doc_string", "model_version", "producer_name", "ir_version"):
        assert getattr(new, field) == getattr(old, field)
    assert new.graph.doc_string == "a graph"


def test_a_policy_decides_layer_by_layer(tmp_path: Path) -> None:
    path, out = save(gqa_model(Decoder(layers=4)), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    policy = {"layers": {"0": None, "2": {"key": "streaming8", "value": "streaming2"}}}
    report = rewrite(path, out, key="streaming4", value="streaming3", policy=policy)
    widths = [one.schemes and tuple(s.bits for s in one.schemes) for one in report.attentions]
    assert widths == [None, (4, 3), (8, 2), (4, 3)]
    layout = same_logits(path, out).layout
    assert [pair and (pair.key.bits, pair.value.bits) for pair in layout.schemes] == widths
    assert [one.past for one in layout.tensors if one.grows] == [
        f"past_key_values.0.{side}" for side in ("key", "value")
    ]
    only = rewrite(path, out, policy={"default": None, "layers": {"3": "streaming2"}}, dry_run=True)
    assert [one.layer for one in only.attentions if one.schemes] == [3]


def test_layers_are_numbered_as_their_caches_are(tmp_path: Path) -> None:
    """Where layers of another kind lie between them, say."""
    model = gqa_model(Decoder())
    for field in (model.graph.input, model.graph.output, model.graph.node):
        text = [one.SerializeToString().replace(b".1.key", b".7.key") for one in field]
        for one, content in zip(field, text, strict=True):
            one.ParseFromString(content.replace(b".1.value", b".7.value"))
    path, out = save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    report = rewrite(path, out, policy={"layers": {"7": "streaming3"}})
    assert [one.layer for one in report.attentions] == [0, 7]
    layout = same_logits(path, out).layout
    assert [bool(pair) for pair in layout.schemes] == [True, *[False] * 6, True]


def test_only_told(tmp_path: Path) -> None:
    path = save(gqa_model(Decoder()), tmp_path / "model.onnx")
    told = rewrite(path, tmp_path / "out.onnx", dry_run=True)
    assert list(tmp_path.iterdir()) == [path]
    done = rewrite(path, tmp_path / "out.onnx")
    assert told == replace(done, files=())
    assert done.to_dict()["rewritten"] == 2


def test_weights_are_referred_to(tmp_path: Path) -> None:
    """In the same folder by their name; in another by a second name of the same file."""
    path = save(gqa_model(Decoder()), tmp_path / "model.onnx", external=True)
    data = tmp_path / "model.onnx.data"
    report = rewrite(path, tmp_path / "out.onnx")
    assert report.files == (tmp_path / "out.onnx",)
    assert set(os.listdir(tmp_path)) == {"model.onnx", "model.onnx.data", "out.onnx"}
    same_logits(path, tmp_path / "out.onnx")
    other = tmp_path / "new" / "folder"
    report = rewrite(path, other / "out.onnx", library=True)
    assert os.path.samefile(data, other / "model.onnx.data")
    assert [one.parent for one in report.files] == [other] * 3
    assert len(os.listdir(other)) == 3
    same_logits(path, other / "out.onnx")
    rewrite(path, other / "again.onnx")  # what is linked already stays


def test_weights_in_a_folder_of_their_own(tmp_path: Path) -> None:
    model = gqa_model(Decoder())
    (tmp_path / "weights").mkdir()
    path = tmp_path / "model.onnx"
    place = "weights/all.bin"
    onnx.save_model(model, path, save_as_external_data=True, location=place, size_threshold=64)
    for out in (tmp_path / "out.onnx", tmp_path / "new" / "out.onnx"):
        rewrite(path, out)
        assert os.path.samefile(tmp_path / place, out.parent / place)
        same_logits(path, out)


def outside(graph: Graph, node: onnx.NodeProto) -> None:
    """Let the logits depend on what a node makes, a scalar of int64."""
    head = next(one for one in graph.nodes if one.output[0] == "logits")
    head.output[0] = "logits_alone"
    graph.nodes.append(node)
    graph.node("Cast", [node.output[0]], "as_float", to=TensorProto.FLOAT)
    graph.node("Mul", ["as_float", graph.array("tenth", np.float32(0.1))], "shift")
    graph.node("Add", ["logits_alone", "shift"], "logits")


def size(name: str, axis: int) -> Change:
    """Read the size of an axis, as exporters do: of the last layer's cache."""

    def change(graph: Graph) -> None:
        graph.node("Shape", [name], "sizes")
        index = graph.array("axis", np.array(axis, np.int64))
        node = helper.make_node("Gather", ["sizes", index], ["size"], name="size")
        outside(graph, node)

    return change


def sliced(graph: Graph) -> None:
    graph.node("Shape", ["past_key_values.1.value"], "sizes", start=-2, end=-1)
    outside(graph, helper.make_node("Squeeze", ["sizes"], ["size"], name="size"))


@pytest.mark.parametrize(
    "change",
    [
        *(size("past_key_values.1.key", axis) for axis in range(4)),
        *(size("present.0.value", axis) for axis in range(4)),
        sliced,
    ],
)  # fmt: skip
def test_sizes_of_a_cache_come_from_elsewhere(change: Change, tmp_path: Path) -> None:
    path, out = save(gqa_model(Decoder(), change), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    report = rewrite(path, out)
    assert (report.rewritten, len(report.changes), report.inputs) == (2, 1, ())
    same_logits(path, out, batch=2)


def test_lengths_are_an_input_where_no_mask_tells_them(tmp_path: Path) -> None:
    """That of a mask, by its axis, may be that of the new tokens alone."""
    model = gqa_model(Decoder(), size("past_key_values.1.key", 2))
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "mask_axis"
    path, out = save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    assert rewrite(path, out).inputs == ("past_lengths",)
    rewritten = same_logits(path, out, batch=2)
    assert "past_lengths" in rewritten.layout.roles


@pytest.mark.parametrize("opset", [17, 20, 23])
def test_opsets_are_raised_where_that_changes_nothing(opset: int, tmp_path: Path) -> None:
    def reduced(graph: Graph) -> None:
        axes = {"axes": [-1]} if opset < 18 else {}
        graph.nodes[-1].output[0] = "logits_alone"
        more = [] if opset < 18 else [graph.array("axes", np.array([-1], np.int64))]
        graph.node("ReduceMean", ["logits_alone", *more], "mean", keepdims=1, **axes)
        graph.node("Sub", ["logits_alone", "mean"], "logits")

    model = gqa_model(Decoder(layers=1, opset=opset), reduced)
    model.ir_version = 8 if opset < 19 else 10
    path, out = save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    report = rewrite(path, out)
    assert report.opset == (opset, max(opset, 21))
    same_logits(path, out)


def test_operators_of_another_meaning_are_not_raised(tmp_path: Path) -> None:
    def resized(graph: Graph) -> None:
        graph.node("Trilu", ["logits"], "lower")
        graph.node("GroupNormalization", ["lower", "lower", "lower"], "odd", num_groups=1)

    path = save(gqa_model(Decoder(opset=18), resized), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"opset 18, in which GroupNormalization .* convert it to"):
        rewrite(path, tmp_path / "out.onnx")
    old = save(gqa_model(Decoder(opset=12)), tmp_path / "old.onnx")
    with pytest.raises(ValueError, match="the model has opset 12; convert it to opset 21 first"):
        rewrite(old, tmp_path / "out.onnx")


def test_schemes_that_a_cache_cannot_have_name_the_layer(tmp_path: Path) -> None:
    path = save(gqa_model(Decoder()), tmp_path / "model.onnx")
    for key, message in (
        ("nsep+pchan4", "layer 0: key.block_size is None"),
        ("streaming5", "unknown scheme name 'streaming5'"),
        ("KIVI-K2V4", "key='KIVI-K2V4' names a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            rewrite(path, tmp_path / "out.onnx", key=key)
    odd = replace(nsq.Scheme.named("streaming4"), outlier_channels=2)
    with pytest.raises(ValueError, match=r"layer 0: value.outlier_channels=2"):
        rewrite(path, tmp_path / "out.onnx", value=odd)


def test_metadata_is_the_layout(tmp_path: Path) -> None:
    path, out = save(gqa_model(Decoder()), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    rewrite(path, out)
    model = onnx.load(out)
    layout = CacheLayout.from_metadata({one.key: one.value for one in model.metadata_props})
    given = {one.name: one for one in model.graph.input}
    made = {one.name: one for one in model.graph.output}
    for tensor in layout.tensors:
        for info in (given.pop(tensor.past), made.pop(tensor.present)):
            kind = info.type.tensor_type
            assert helper.tensor_dtype_to_np_dtype(kind.elem_type).name == tensor.dtype
            assert [one.dim_value or None for one in kind.shape.dim] == [
                size if isinstance(size, int) else None for size in tensor.shape
            ]
    assert set(given) == {"input_ids", "attention_mask"}
    assert set(made) == {"logits"}


def test_what_the_model_says_of_itself_is_kept(tmp_path: Path) -> None:
    """A model of floats with a layout of its own: roles, and lengths that are inputs."""

    def with_lengths(graph: Graph) -> None:
        graph.nodes[1].op_type, graph.nodes[1].input[:] = "Sub", ["all", "one"]
        graph.node("Add", ["past_lengths", "new_lengths"], "all")
        graph.nodes.insert(0, graph.nodes.pop())
        for name in ("past_lengths", "new_lengths"):
            graph.input(name, TensorProto.INT64, "batch_size")
        graph.input("ids_of_images", TensorProto.INT64, "batch_size")

    model = gqa_model(Decoder(layers=1), with_lengths)
    roles = {
        name: name
        for name in ("input_ids", "attention_mask", "past_lengths", "new_lengths", "logits")
    }
    names = [(f"past_key_values.0.{side}", f"present.0.{side}") for side in ("key", "value")]
    shape = ("batch", 2, "past", 16)
    old = CacheLayout(
        roles, tuple(CacheTensor(*pair, "float32", shape) for pair in names), (None,),
        context_length=99,
    )  # fmt: skip
    for name, text in old.to_metadata().items():
        model.metadata_props.add(key=name, value=text)
    path, out = save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    assert rewrite(path, out).inputs == ()
    made = onnx.load(out)
    metadata = {one.key: one.value for one in made.metadata_props}
    assert len(made.metadata_props) == len(metadata) == 2
    layout = CacheLayout.from_metadata(metadata)
    assert (layout.roles, layout.context_length, layout.right_padding) == (roles, 99, False)
    node = next(one for one in made.graph.node if one.op_type == "Attention")
    assert list(node.input[3:5]) == ["past_lengths", "new_lengths"]


def test_a_window_that_stays_has_its_size_in_the_metadata(tmp_path: Path) -> None:
    attributes = (("local_window_size", 4), ("sliding_window_cache", 1))
    path = save(gqa_model(Decoder(attributes=attributes)), tmp_path / "model.onnx")
    rewrite(path, tmp_path / "out.onnx", policy={"layers": {"0": None}})
    layout = Rewritten(tmp_path / "out.onnx", native=True).layout
    assert layout.tensors[-1] == CacheTensor(
        "past_key_values.0.value", "present.0.value", "float32", ("batch", 2, 4, 16)
    )


def test_caches_that_nobody_is_known_to_read_are_told(tmp_path: Path) -> None:
    def another(graph: Graph) -> None:
        graph.input("past_states.0", graph.kind, "batch_size", 64, 3)
        graph.node("Neg", ["past_states.0"], "present_states.0")
        graph.output("present_states.0", graph.kind, "batch_size", 64, 3)

    path, out = save(gqa_model(Decoder(), another), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    report = rewrite(path, out)
    assert report.attentions[2][1:5] == (
        "past_states.0", "", None, "no attention that is known reads this cache"
    )  # fmt: skip
    # A loop could not run it by the metadata, which so has nothing.
    assert [one.key for one in onnx.load(out).metadata_props] == ["made by"]


def test_names_that_are_taken(tmp_path: Path) -> None:
    """New nodes get others; inputs have names that loops look for."""

    def taken(graph: Graph) -> None:
        graph.nodes[-1].output[0] = "nsq_attention_0_present_lengths"
        graph.node("Identity", ["nsq_attention_0_present_lengths"], "logits")
        graph.node("Neg", ["one"], "past_lengths")

    path, out = save(gqa_model(Decoder(), taken), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    rewrite(path, out)
    same_logits(path, out)
    with pytest.raises(ValueError, match="has a tensor 'past_lengths' already; rename it"):
        rewrite(path, out, row_lengths=True)

    def cache(graph: Graph) -> None:
        graph.input("past_key_values.1.key.tail", TensorProto.INT64)

    path = save(gqa_model(Decoder(), cache), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"input or output 'past_key_values.1.key.tail' already"):
        rewrite(path, out)


def test_ten_gigabytes_of_weights_are_not_read(tmp_path: Path) -> None:
    model = gqa_model(Decoder())
    path = save(model, tmp_path / "model.onnx", external=True)
    model = onnx.load(path, load_external_data=False)
    data = tmp_path / "model.onnx.data"
    head = next(one for one in model.graph.initializer if one.name == "head")
    end = data.stat().st_size
    head.dims[:] = [64, (10 << 30) // 256]
    places = {"location": data.name, "offset": str(end), "length": str(10 << 30)}
    del head.external_data[:]
    for name, text in places.items():
        head.external_data.add(key=name, value=text)
    with open(data, "r+b") as file:
        file.truncate(end + (10 << 30))  # a hole
    onnx.save(model, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rewrite(path, tmp_path / "new" / "out.onnx")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KB
    assert os.path.samefile(data, tmp_path / "new" / data.name)
    assert data.stat().st_blocks * 512 < 1 << 30
