"""Put what an exporter wrote into one small file: no external data, no paths, no Python traces."""

from pathlib import Path

import onnx

EXPORTS = Path(__file__).parent.parent


def keep(path: Path, name: str) -> None:
    """Copy a model to the fixtures, its initializers as they are."""
    model = onnx.load(path)
    model.doc_string = ""
    model.graph.doc_string = ""
    if "/" in model.graph.name:
        model.graph.name = "main_graph"
    del model.metadata_props[:]
    for graph in (model.graph, *model.functions):
        graph.doc_string = ""
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in graph.value_info:
            del value.metadata_props[:]
        del graph.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    target = EXPORTS / f"{name}.onnx"
    onnx.save(model, target)
    print(f"{target.name}: {target.stat().st_size} bytes, {len(model.graph.node)} nodes")
