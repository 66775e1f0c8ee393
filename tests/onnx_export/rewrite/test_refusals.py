"""Models and requests that are refused: by node, or in one line, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_export.rewrite import RewriteReport, rewrite
from tests.onnx_export.rewrite.test_core import same_logits
from tests.support.command import nsq, refused, said
from tests.support.exported import Decoder, Graph, gqa_model, save

Change = Callable[[Graph], None]


def attention(graph: Graph, layer: int = 1) -> onnx.NodeProto:
    found = [one for one in graph.nodes if one.op_type == "GroupQueryAttention"]
    return found[layer]


def output_of_present(graph: Graph) -> None:
    graph.node("ReduceSum", ["present.1.key"], "sum", keepdims=0)
    graph.output("sum", TensorProto.FLOAT)


def part_of_past(graph: Graph) -> None:
    first = [graph.array(name, np.array([at], np.int64)) for name, at in (("a", 0), ("b", 1))]
    graph.node("Slice", ["past_key_values.1.value", *first, "a"], "part")
    graph.output("part", TensorProto.FLOAT)


def captured(graph: Graph) -> None:
    """A branch reads the present of the graph around it."""
    kind = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)
    branches = [
        helper.make_graph(
            [helper.make_node("Neg", ["present.1.key"], ["chosen"])], name, [], [kind]
        )
        for name in ("then", "else")
    ]
    graph.array("yes", np.array(True))
    graph.node("If", ["yes"], "chosen_one", then_branch=branches[0], else_branch=branches[1])
    graph.output("chosen_one", TensorProto.FLOAT)


def used_twice(graph: Graph) -> None:
    """Layer 1 attends to the cache of layer 0."""
    given = attention(graph).input
    given[3], given[4] = "past_key_values.0.key", "past_key_values.0.value"


def one_cache(graph: Graph) -> None:
    attention(graph).input[4] = "past_key_values.1.key"


def shared(graph: Graph) -> None:
    """Layer 1 goes on where layer 0 ended."""
    given = attention(graph).input
    given[3], given[4] = "present.0.key", "present.0.value"


def transposed(graph: Graph) -> None:
    turned = "past_key_values.1.key.turned"
    info = next(one for one in graph.inputs if one.name == "past_key_values.1.key")
    axes = info.type.tensor_type.shape.dim
    axes[1].dim_param, axes[2].dim_param = axes[2].dim_param, "2"
    axes[1].dim_param, axes[2].dim_value = "past_sequence_length", 2
    node = helper.make_node("Transpose", [info.name], [turned], perm=[0, 2, 1, 3])
    graph.nodes.insert(graph.nodes.index(attention(graph)), node)
    attention(graph).input[3] = turned


def no_output(graph: Graph) -> None:
    graph.outputs.pop()


def in_a_branch(graph: Graph) -> None:
    node = attention(graph)
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    branches = [helper.make_graph([node], name, [], infos) for name in ("then", "else")]
    graph.array("yes", np.array(True))
    place = graph.nodes.index(node)
    made = helper.make_node(
        "If", ["yes"], list(node.output), "choice", then_branch=branches[0], else_branch=branches[1]
    )
    graph.nodes[place] = made


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (output_of_present, "present.1.key of its cache is read by ReduceSum /sum/ReduceSum too"),
        (part_of_past, "past_key_values.1.value of its cache is read by Slice /part/Slice too"),
        (captured, "present.1.key of its cache is read by If /chosen_one/If too"),
        (used_twice, "past_key_values.0.key is the cache of"),
        (one_cache, "its keys and its values are one cache"),
        (shared, "its past present.0.key is not an input of the model"),
        (transposed, "its past past_key_values.1.key.turned is not an input of the model"),
        (no_output, "its present present.1.value is 0 of the model's outputs, not one"),
        (in_a_branch, "it is in a branch of If choice; inline that first"),
    ],
)
def test_an_attention_is_refused_by_name(change: Change, reason: str, tmp_path: Path) -> None:
    path = save(gqa_model(Decoder(), change), tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx")
    second = [one for one in report.attentions if one.pattern][-1]
    assert not report.complete
    assert "layers.1" in second.node
    assert second.reason is not None
    assert second.reason.startswith(reason)
    assert second.schemes is None
    if change not in (used_twice, shared):  # the other layer is fine
        assert report.rewritten == 1
        assert (tmp_path / "out.onnx").exists()


def test_what_is_refused_stays_right(tmp_path: Path) -> None:
    """A layer with a quantized cache, and one with a cache of floats that something else reads."""
    path, out = (
        save(gqa_model(Decoder(), output_of_present), tmp_path / "model.onnx"),
        tmp_path / "out.onnx",
    )
    rewrite(path, out)
    same_logits(path, out)


def test_a_layer_beside_two_that_share_a_cache(tmp_path: Path) -> None:
    path = save(gqa_model(Decoder(layers=3), used_twice), tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx")
    reasons = [one.reason for one in report.attentions]
    assert [bool(reason) for reason in reasons] == [True, True, False, True, True]
    assert [one.node for one in report.attentions[3:]] == [
        f"past_key_values.1.{side}" for side in ("key", "value")
    ]


ATTRIBUTES: list[tuple[dict[str, Any], str]] = [
    ({"k_quant_type": "PER_TENSOR"}, "k_quant_type is PER_TENSOR; export the model with a cache"),
    ({"v_quant_type": "PER_CHANNEL"}, "v_quant_type is PER_CHANNEL; export"),
    ({"kv_cache_bit_width": 8}, "kv_cache_bit_width is set; export the model with"),
    ({"qk_output": 1}, "it gives out its scores"),
    ({"of_tomorrow": 1}, "attribute of_tomorrow is unknown"),
    ({"kv_num_heads": 3}, "num_heads=4 is not a multiple of kv_num_heads=3"),
]


@pytest.mark.parametrize(("attributes", "reason"), ATTRIBUTES)
def test_options_without_a_place(attributes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    def change(graph: Graph) -> None:
        for layer in range(2):
            node = attention(graph, layer)
            for one in [one for one in node.attribute if one.name in attributes]:
                node.attribute.remove(one)
            node.attribute.extend(helper.make_attribute(*one) for one in attributes.items())

    assert all_refused(gqa_model(Decoder(), change), tmp_path).startswith(reason)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (12, "k_scale is given: its cache is quantized already"),
        (14, "it has one of q_norm_weight and k_norm_weight; it needs both, or neither"),
        (17, "it has 18 inputs; 17 are known"),
    ],
)
def test_inputs_without_a_place(place: int, reason: str, tmp_path: Path) -> None:
    def change(graph: Graph) -> None:
        name = graph.array("more", np.ones(16, np.float32))
        for layer in range(2):
            given = attention(graph, layer).input
            given.extend([""] * (place - len(given)) + [name])

    assert all_refused(gqa_model(Decoder(), change), tmp_path).startswith(reason)


@pytest.mark.parametrize(
    ("operator", "place", "reason"),
    [
        ("Attention", 4, "keys and values are one tensor of five axes; export the model with"),
        ("PagedAttention", 3, "its cache is in pages; export the model without paged attention"),
        ("DecoderMaskedMultiHeadAttention", 5, "its cache is a buffer for beams"),
        ("SparseAttention", 3, "it sees blocks of its cache, which nsq.Attention does not"),
    ],
)
def test_caches_of_another_kind(operator: str, place: int, reason: str, tmp_path: Path) -> None:
    """Each once, and not its inputs again."""

    def change(graph: Graph) -> None:
        for node in [attention(graph, layer) for layer in range(2)]:
            pasts = list(node.input[3:5])
            node.op_type = operator
            del node.attribute[:]
            node.input[:] = [node.input[0], *[""] * (place - 1), *pasts]

    path = save(gqa_model(Decoder(), change), tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx")
    assert len(report.attentions) == 2
    assert all((one.reason or "").startswith(reason) for one in report.attentions)
    assert not (tmp_path / "out.onnx").exists()


def test_dtypes_without_a_place(tmp_path: Path) -> None:
    model = gqa_model(Decoder())
    for one in (*model.graph.input, *model.graph.output):
        if one.type.tensor_type.elem_type == TensorProto.FLOAT:
            one.type.tensor_type.elem_type = TensorProto.BFLOAT16
    assert all_refused(model, tmp_path).startswith("its cache is bfloat16; nsq.Attention has")


def test_sizes_that_contradict_the_node(tmp_path: Path) -> None:
    model = gqa_model(Decoder())
    for one in model.graph.output[-2:]:
        one.type.tensor_type.shape.dim[1].dim_value = 4
    path = save(model, tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx")
    assert report.attentions[1].reason == (
        "present.1.key has 4 places on axis 1, where the node has 2"
    )


def test_heads_of_unknown_size(tmp_path: Path) -> None:
    model = gqa_model(Decoder(symbolic=True, packed=False))
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.op_type, node.domain = "Mystery", "elsewhere"
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    assert "the size of its heads is stated nowhere" in all_refused(model, tmp_path)


def test_functions_of_the_model(tmp_path: Path) -> None:
    """Those with attention are inlined, also from within others, and the rest stays."""

    def in_function(graph: Graph) -> None:
        body = helper.make_node("Identity", ["x"], ["y"])
        opsets = [helper.make_opsetid("", 21)]
        graph.functions.append(helper.make_function("local", "Same", ["x"], ["y"], [body], opsets))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        for layer in (1, 0):
            node = attention(graph, layer)
            given = [one for one in node.input if one]
            body = "local", f"Layer{layer}", given, node.output, [node], opsets
            graph.functions.append(helper.make_function(*body))
            call = helper.make_node(f"Layer{layer}", given, node.output, domain="local")
            graph.nodes[graph.nodes.index(node)] = call

    path = save(gqa_model(Decoder(), in_function), tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx")
    assert report.complete
    plain = save(gqa_model(Decoder()), tmp_path / "plain.onnx")
    rewrite(plain, tmp_path / "same.onnx")
    texts = []
    for name in ("out", "same"):
        model = onnx.load(tmp_path / f"{name}.onnx")
        left = {one.name for one in model.functions if one.domain == "local"}
        assert left == ({"Same"} if name == "out" else set())
        texts.append([(one.op_type, one.domain, one.attribute) for one in model.graph.node])
    assert texts[0] == texts[1]


def test_nodes_in_another_order(tmp_path: Path) -> None:
    """As converters to float16 leave them, and ONNX Runtime reads them."""
    path = save(gqa_model(Decoder()), tmp_path / "plain.onnx")
    rewrite(path, tmp_path / "same.onnx")
    model = onnx.load(path)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    report = rewrite(save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx")
    assert report.complete
    made = {one.name for one in (*model.graph.input, *model.graph.initializer)} | {""}
    made |= {one.name for one in onnx.load(tmp_path / "out.onnx").graph.input}
    for node in onnx.load(tmp_path / "out.onnx").graph.node:
        assert made.issuperset(node.input)
        made.update(node.output)


def all_refused(model: onnx.ModelProto, folder: Path) -> str:
    """Return why the last attention is refused, where all are: nothing is written."""
    path = save(model, folder / "model.onnx")
    report = rewrite(path, folder / "out.onnx")
    assert (report.rewritten, report.files, report.complete) == (0, (), False)
    assert list(folder.iterdir()) == [path]
    return [one.reason for one in report.attentions if one.pattern][-1] or ""


# --- files and requests --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(gqa_model(Decoder()), tmp_path / "model.onnx", external=True)
    return tmp_path


def test_files_that_are_no_models(folder: Path) -> None:
    whole = (folder / "model.onnx").read_bytes()
    for content, message in (
        (b"", "is no ONNX model: it has no nodes"),
        (b"not a model", "is no ONNX model, or is cut off"),
        (whole[: len(whole) // 2], "is no ONNX model, or is cut off"),
        (whole[:-200], "is no ONNX model"),
    ):
        (folder / "bad.onnx").write_bytes(content)
        assert message in refused("onnx", "rewrite", "bad.onnx", "out.onnx", cwd=folder)
    assert "No such file" in refused("onnx", "rewrite", "none.onnx", "out.onnx", cwd=folder)
    assert "Is a directory" in refused("onnx", "rewrite", ".", "out.onnx", cwd=folder)
    with open(folder / "large.onnx", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(ValueError, match="one file of ONNX holds less than 2 GB"):
        rewrite(folder / "large.onnx", folder / "out.onnx")


def test_weights_that_are_missing_or_cut_off(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-8])
    message = refused("onnx", "rewrite", "model.onnx", "out.onnx", cwd=folder)
    assert "model.onnx.data is cut off" in message
    data.unlink()
    message = refused("onnx", "rewrite", "model.onnx", "out.onnx", cwd=folder)
    assert "model.onnx.data: is missing: it holds weights of model.onnx" in message


def test_weights_outside_of_the_folder(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in model.graph.initializer[-1].external_data:
        if entry.key == "location":
            entry.value = "../model.onnx.data"
    onnx.save(model, folder / "model.onnx")
    message = refused("onnx", "rewrite", "model.onnx", "out.onnx", cwd=folder)
    assert "is in '../model.onnx.data', outside its folder" in message


def test_places_that_cannot_be_written(folder: Path) -> None:
    for out, message in (
        ("model.onnx", "model.onnx exists; choose another name, or replace it with --force"),
        (".", "exists; choose another name"),
        ("-", "- is no file name"),
        ("model.onnx/out.onnx", "Not a directory"),
    ):
        assert message in refused("onnx", "rewrite", "model.onnx", out, cwd=folder)
    for out, message in (
        ("model.onnx", "model.onnx is the model itself; choose another name"),
        ("model.onnx.data", "model.onnx.data holds weights of the model; choose another name"),
        (".", "exists and is not a regular file"),
    ):
        assert message in refused("onnx", "rewrite", "model.onnx", out, "--force", cwd=folder)
    (folder / "new").mkdir()
    (folder / "new" / "model.onnx.data").write_bytes(b"of somebody else")
    message = refused("onnx", "rewrite", "model.onnx", "new/out.onnx", cwd=folder)
    assert "is another file than the model's weights; choose another folder" in message


def test_another_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(old: str, new: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), old, None, str(new))

    monkeypatch.setattr(os, "link", link)
    message = refused("onnx", "rewrite", "model.onnx", "new/out.onnx", cwd=folder)
    assert message == (
        "nsq: new/model.onnx.data: the weights of model.onnx.data cannot be linked to (Invalid "
        "cross-device link), and ONNX Runtime reads them from the model's folder only; write into "
        ".\n"
    )
    assert not (folder / "new").exists()


def test_a_full_disk_leaves_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    program = (
        "import resource, sys; from nsq_ref.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500));"
        "sys.argv = ['nsq', 'onnx', 'rewrite', 'model.onnx', 'new/out.onnx']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "nsq: new/out.onnx: File too large"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([], "a policy is an object with default and layers"),
        ({"layer": {}}, "policy: 'layer' is unknown; there are default and layers"),
        ({"layers": {"2": None}}, "policy: there is no layer 2; the model has layers 0 to 1"),
        ({"layers": {"one": None}}, "policy: 'one' is no number of a layer"),
        ({"layers": {"1": None, "01": None}}, "policy: layer 1 is named twice"),
        ({"layers": {"1": "streaming5"}}, "policy: layer 1: unknown scheme name 'streaming5'"),
        ({"layers": {"1": "naive4"}}, "layer 1: key.block_size is None"),
        ({"layers": {"1": 4}}, "policy: layer 1: must be null, a name, or key and value, got 4"),
        ({"layers": {"1": {"key": "streaming4"}}}, "policy: layer 1: has key; give key and value"),
        (
            {"layers": {"1": {"key": "streaming4", "value": None}}},
            "policy: layer 1: value is null: keys and values of a layer are quantized together",
        ),
        (
            {"layers": {"1": {"key": {"bits": 4}, "value": "streaming4"}}},
            "policy: layer 1: ",
        ),
        ({"default": "streaming"}, "policy: default: unknown scheme name 'streaming'"),
        ({"default": None}, "the policy leaves every layer as it is; name a scheme for one"),
        ({"layers": 3}, "policy: layers must be a mapping from layer to scheme, got 3"),
    ],
)
def test_policies_that_do_not_fit(policy: Any, message: str, folder: Path) -> None:
    (folder / "policy.json").write_text(json.dumps(policy))
    command = ("onnx", "rewrite", "model.onnx", "out.onnx", "--policy", "policy.json")
    assert message in refused(*command, cwd=folder)


def test_other_requests(folder: Path) -> None:
    (folder / "policy.json").write_text("{'layers'")
    for arguments, message in (
        (("--policy", "policy.json"), "policy.json: Expecting property name"),
        (("--policy", "none.json"), "none.json: No such file"),
        (("--scheme", "streaming5"), "unknown scheme name 'streaming5'"),
        (("--key", "nsep+pchan4"), "layer 0: key.block_size is None"),
        (("--value", "nsep+KIVI"), "value='nsep+KIVI' names a pair"),
    ):
        command = ("onnx", "rewrite", "model.onnx", "out.onnx", *arguments)
        assert message in refused(*command, cwd=folder)


def test_models_without_a_cache(folder: Path) -> None:
    node = helper.make_node("Neg", ["x"], ["y"])
    infos = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in "xy"]
    save(helper.make_model(helper.make_graph([node], "graph", *infos)), folder / "plain.onnx")
    message = refused("onnx", "rewrite", "plain.onnx", "out.onnx", cwd=folder)
    assert "plain.onnx has no attention with a cache that is known" in message
    rewrite(folder / "model.onnx", folder / "out.onnx")
    message = refused("onnx", "rewrite", "out.onnx", "again.onnx", cwd=folder)
    assert "out.onnx has operators of nsq already; rewrite its original" in message


# --- what the command says -----------------------------------------------------------------------


def test_the_command(folder: Path) -> None:
    told = said("onnx", "rewrite", "model.onnx", "out.onnx", "--dry-run", cwd=folder)
    assert "to rewrite: 2 of 2 attentions" in told
    assert not (folder / "out.onnx").exists()
    command = ("onnx", "rewrite", "model.onnx", "out.onnx", "--scheme", "streaming3", "--library")
    lines = said(*command, "--value", "streaming4", cwd=folder).splitlines()
    assert lines[1].split() == [
        "0", "/model/layers.0/attn/GroupQueryAttention", "GroupQueryAttention", "streaming3",
        "streaming4",
    ]  # fmt: skip
    assert "rewritten: 2 of 2 attentions" in lines
    assert lines[-2] == "out.onnx"
    assert (folder / lines[-1]).stat().st_size > 10_000  # the library
    report = json.loads(said(*command, "--force", "--json", cwd=folder))
    assert report["attentions"][1]["schemes"]["key"]["bits"] == 3
    assert report["files"][0] == "out.onnx"


def test_a_refusal_is_exit_code_1(tmp_path: Path) -> None:
    save(gqa_model(Decoder(), output_of_present), tmp_path / "model.onnx")
    text = nsq("onnx", "rewrite", "model.onnx", "out.onnx", cwd=tmp_path, code=1).stdout
    assert "refused: present.1.key of its cache is read by ReduceSum /sum/ReduceSum too" in text
    assert "rewritten: 1 of 2 attentions" in text


def test_a_report_is_json() -> None:
    assert json.loads(json.dumps(RewriteReport(()).to_dict()))["complete"] is True
