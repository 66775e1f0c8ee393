"""Reading a model without its weights, and writing one beside them.

ONNX Runtime reads external data only from the folder of the model or below it, and follows no
symbolic link out of it (measured with 1.32: a relative path and a symbolic link are both refused).
So a model that is written into another folder gets hard links: the same bytes on the same disk,
under a second name. Whoever changes one file in place changes both; a file that is replaced, as
exporters do it, stays what it was under the other name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from nsq_ref.extras import extra
from nsq_ref.files import atomic
from onnx_export.operators.nodes import all_nodes

with extra("rewrite", __name__):
    import onnx
    import onnx.inliner
    import onnx_ir as ir
    from google.protobuf.message import DecodeError, EncodeError

__all__ = ["as_ir", "external_files", "inlined", "read", "write"]

LARGEST_MESSAGE = 2**31 - 1  # of protobuf


def read(path: Path) -> onnx.ModelProto:
    """Read a model without its external data, which must be there.

    Raises
    ------
    OSError
        Where a file is missing or cannot be read.
    ValueError
        For what is no ONNX model, or one that is cut off.
    """
    size = path.stat().st_size
    if size > LARGEST_MESSAGE:
        raise ValueError(
            f"{path} has {size} bytes; one file of ONNX holds less than 2 GB, and the weights are "
            "kept as external data beside it"
        )
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ValueError(f"{path} is no ONNX model, or is cut off") from None
    if not model.graph.node or not model.opset_import:
        raise ValueError(f"{path} is no ONNX model: it has no nodes, or states no opset")
    if model.graph.sparse_initializer or model.training_info:
        raise ValueError(f"{path} has sparse initializers or training information; remove them")
    _require_data(path, model)
    return model


def inlined(model: onnx.ModelProto, operators: Container[tuple[str, str]]) -> onnx.ModelProto:
    """Return a model with those of its functions inlined that have some operators within."""
    found: set[tuple[str, str]] = set()
    size = -1
    while size < len(found):
        size = len(found)
        for function in model.functions:
            called = {(node.domain, node.op_type) for node in all_nodes(function.node)}
            if any(one in operators or one in found for one in called):
                found.add((function.domain, function.name))
    return onnx.inliner.inline_selected_functions(model, sorted(found)) if found else model


def as_ir(model: onnx.ModelProto, folder: Path) -> ir.Model:
    """Return the same model as objects that know of each other; weights are mapped when read.

    Converters to float16 put Casts at the end, which ONNX Runtime reads all the same: where a node
    stands before what it reads, the nodes of both are put in order.

    Raises
    ------
    ValueError
        For a graph that is malformed.
    """
    try:
        graph = ir.from_proto(model)
    except (ir.serde.SerdeError, NotImplementedError) as error:
        fault: BaseException = error
        while fault.__cause__ is not None:
            fault = fault.__cause__
        raise ValueError(f"the graph cannot be read: {fault}") from error
    _sort(model, graph)
    ir.external_data.set_base_dir(graph.graph, folder)
    return graph


def _sort(model: onnx.ModelProto, graph: ir.Model) -> None:
    """Put nodes behind what they read, if they are not."""
    later = {name for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if any(name in later for inner in all_nodes([node]) for name in inner.input):
            break
        later.difference_update(node.output)
    else:
        return
    messages = dict(zip(graph.graph, model.graph.node, strict=True))
    try:
        graph.graph.sort()
    except ValueError as error:
        raise ValueError("the graph cannot be read: nodes wait for each other") from error
    nodes = [messages[node] for node in graph.graph]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def external_files(model: onnx.ModelProto) -> list[str]:
    """Return the files that tensors of a model are in, relative to its folder."""
    return sorted({_entries(tensor)["location"] for tensor in _external(model)})


def write(
    model: onnx.ModelProto,
    source: Path,
    target: Path,
    library: Path | None = None,
    beside: Iterable[tuple[Path, atomic.Content]] = (),
) -> list[Path]:
    """Write a model beside the weights that it refers to: all, or nothing.

    Parameters
    ----------
    model : onnx.ModelProto
    source : Path
        The file that it was made from.
    target : Path
        The file to write; its folder is made if it is missing.
    library : Path, optional
        Copied beside it.
    beside : iterable of (Path, content)
        Other files to write.

    Returns
    -------
    list of Path
        What was written and linked.

    Raises
    ------
    OSError, ValueError
        Where that is not possible.
    """
    try:
        content = model.SerializeToString()
    except (EncodeError, ValueError) as error:  # which of the two depends on protobuf
        raise ValueError(f"{target} would have 2 GB or more, which ONNX does not allow") from error
    files: list[tuple[Path, atomic.Content]] = [(target, content), *beside]
    if library is not None:
        found = library
        files.append(
            (target.parent / library.name, lambda path: [shutil.copyfile(found, path)][:0])
        )
    made: list[Path] = []
    with contextlib.ExitStack() as undo:
        for name in external_files(model):
            old, new = source.parent / name, target.parent / name
            if _link(old, new, undo):
                made.append(new)
        atomic.write(files, make_folders=True)
        undo.pop_all()
    return [*(path for path, _ in files), *made]


def _link(old: Path, new: Path, undo: contextlib.ExitStack) -> bool:
    """Give a file a second name; False where it has it already."""
    if new.exists():
        if os.path.samefile(old, new):
            return False
        raise FileExistsError(
            errno.EEXIST, "is another file than the model's weights; choose another folder", new
        )
    _make_folders(new.parent, undo)
    try:
        os.link(os.path.realpath(old), new)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        raise OSError(
            error.errno,
            f"the weights of {old} cannot be linked to ({error.strerror}), and ONNX Runtime reads "
            f"them from the model's folder only; write into {old.parent}",
            str(new),
        ) from error
    undo.callback(_remove, new)
    return True


def _make_folders(folder: Path, undo: contextlib.ExitStack) -> None:
    if folder.exists():
        return
    _make_folders(folder.parent, undo)
    folder.mkdir()
    undo.callback(_remove, folder)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def _require_data(path: Path, model: onnx.ModelProto) -> None:
    sizes: dict[str, int] = {}
    for tensor in _external(model):
        entries = _entries(tensor)
        name = entries.get("location", "")
        inside = Path(os.path.normpath(name))
        if not name or inside.is_absolute() or inside.parts[0] == "..":
            raise ValueError(
                f"{path}: the data of {tensor.name} is in {name!r}, outside its folder"
            )
        if name not in sizes:
            data = path.parent / name
            if not data.is_file():
                raise FileNotFoundError(
                    errno.ENOENT, f"is missing: it holds weights of {path}", str(data)
                )
            sizes[name] = data.stat().st_size
        try:
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        except ValueError:
            raise ValueError(f"{path}: offset or length of {tensor.name} is no number") from None
        if end > sizes[name]:
            raise ValueError(
                f"{path.parent / name} is cut off: {tensor.name} ends at byte {end}, the file "
                f"at {sizes[name]}"
            )


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _external(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in all_nodes(nodes):
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for graph in (attribute.g, *attribute.graphs):
                    yield from graph.initializer
