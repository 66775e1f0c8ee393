"""Shared libraries as ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance.operations import (
    NOT_IMPLEMENTED,
    REFUSED,
    Case,
    Failure,
)
from nsq_ref.conformance.ports import (
    open_port,
)
from nsq_ref.conformance.ports.library import Library
from tests.support.asked import (
    ALL_PARTS,
    FUNCTIONS,
    PCHAN,
    PORTS,
    answered,
    arrays_of,
    attend_case,
    case,
    decode_case,
    equal,
    failed,
    normal,
    stream_case,
)
from tests.support.compilers import compile_library

PART_NAMES = ("packed", "scale", "norm", "zero", "outlier_index", "outliers", "sinks")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("library") / "libport.so"
    return str(compile_library(PORTS / "library.c", output))


@pytest.fixture(scope="module")
def in_c(library: str) -> Library:
    """The library in this process, which the guards protect from all that it is told below."""
    return Library(library)


def told_to(what: int, kind: Any = np.float32) -> Case:
    x = np.zeros((5, 4), kind)
    x[0, 0] = what
    return case("encode", ALL_PARTS, x=x)


def test_outputs_of_a_library(in_c: Library) -> None:
    """Every part lies where nsq.h says, at 64 bytes, in the order of nsq_parts."""
    layout = ALL_PARTS.layout(5, 4)
    expected = {}
    for number, (name, field) in enumerate((name, layout[name]) for name in PART_NAMES):
        part = np.empty(field.shape, field.dtype)
        part.view(np.uint8)[...] = number
        expected[name] = part
    got = arrays_of(in_c.ask(0, told_to(0)))
    equal({name: got[name] for name in PART_NAMES}, expected)


@pytest.mark.parametrize(("kind", "number"), [(np.float16, 1), (ml_dtypes.bfloat16, 2)])
def test_what_a_library_is_told(in_c: Library, kind: Any, number: int) -> None:
    """I1: dtype and shape, leading axes merged; the parts come back with the axes of x."""
    x = np.zeros((2, 3, 5, 8), kind)
    got = arrays_of(in_c.ask(0, case("encode", Scheme(), x=x)))
    assert got["packed"].ravel()[:4].tolist() == [number, 6, 5, 8]
    assert got["packed"].shape == (2, 3, 5, 4)
    assert got["scale"].tobytes() == b"\xa5" * got["scale"].nbytes


def test_a_library_decodes(in_c: Library) -> None:
    """D1."""
    scheme = Scheme(separate_norm=False, scale_dtype="float32")
    x = normal(2, 3, 7, 5)
    got = arrays_of(in_c.ask(0, decode_case(x, scheme)))
    equal(got, {"x_hat": nsq.dequantize(nsq.quantize(x, scheme))})
    assert answered(in_c.ask(0, decode_case(x, Scheme()))).status == NOT_IMPLEMENTED


def test_a_library_attends(in_c: Library) -> None:
    """A1: every field of nsq_attention, and the parts of both sides."""
    asked = attend_case(softcap=2.5, sliding_window=3)
    got = arrays_of(in_c.ask(0, asked))["output"]
    assert got.shape == (2, 3, 6)
    packed = [asked.inputs[f"{side}.packed"].flat[0] for side in ("keys", "values")]
    query = asked.inputs["query"].flat[0]
    assert got.ravel()[:16].tolist() == [
        2, 3, 1, 5, 4, 6, 0.5, 1, 2.5, 3, query, 8, packed[0], 4, packed[1], 1,
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 14])
def test_a_library_streams(in_c: Library, tokens: int) -> None:
    """B1 K1: sinks, sealed blocks and tail of one row; no blocks is a length of 0."""
    scheme = Scheme(block_size=3, sink_tokens=2)
    x = normal(2, 40, 4)
    got = arrays_of(in_c.ask(0, stream_case(scheme, [[0, 1, tokens], [0, 5, 0]], x, row=1)))
    sinks = min(tokens, 2)
    sealed = (tokens - sinks) // 3 * 3
    assert got["packed"].tolist() == [[0x88, 0x88]] * sealed
    assert got["scale"].shape == (sealed // 3, 4)
    assert got["sinks"].tobytes() == x[1, :sinks].tobytes()
    assert got["tail"].tobytes() == x[1, sinks + sealed : tokens].tobytes()


def test_a_library_streams_with_feedback(in_c: Library) -> None:
    """F1: order, factor and heads come to it, and the same comes out."""
    scheme = Scheme(block_size=3)
    asked = stream_case(scheme, [[0, 1, 4]], normal(2, 40, 4), row=1)
    order, factor = np.int32([[0, 1, 2, 3], [1, 0, 3, 2]]), np.zeros((2, 4, 4), np.float32)
    factor[0, 0, 1] = 7
    given = {**asked.inputs, "order": order, "factor": factor}
    got = arrays_of(in_c.ask(0, case("stream_feedback", scheme, **given)))
    assert got["packed"].tolist() == [[2, 2], [7, 0x88], [0x88, 0x88]]
    assert got["tail"].tobytes() == asked.inputs["x"][1, 3:4].tobytes()


@pytest.mark.parametrize("number", range(7))
def test_writing_beside_a_buffer(in_c: Library, number: int) -> None:
    """Of every part, before it and behind it."""
    name = PART_NAMES[number]
    before, behind = (failed(in_c.ask(0, told_to(what + number))) for what in (1, 11))
    assert before == Failure(
        "out of bounds", f"nsq_encode wrote before {name} (first at byte 4 ahead of its start)"
    )
    assert behind == Failure(
        "out of bounds", f"nsq_encode wrote behind {name} (first at byte 12 past its end)"
    )
    arrays_of(in_c.ask(1, told_to(0)))


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        (21, "out of bounds", "nsq_encode wrote to x, which is only to be read"),
        (22, "out of bounds", "nsq_encode wrote to scheme, which is only to be read"),
        (23, "out of bounds", "nsq_encode wrote to out, which is only to be read"),
        (25, "garbage", "nsq_encode returned 7; an nsq_status is 0, 1 or 2"),
    ],
)
def test_what_a_library_may_not_do(in_c: Library, what: int, kind: Any, says: str) -> None:
    assert failed(in_c.ask(0, told_to(what))) == Failure(kind, says)


def test_what_a_library_may_do(in_c: Library) -> None:
    assert answered(in_c.ask(0, told_to(27))).status == REFUSED
    assert answered(in_c.ask(0, told_to(28))).status == NOT_IMPLEMENTED


def test_a_library_in_a_process_of_its_own(library: str) -> None:
    port = open_port(library)
    arrays_of(port.ask(0, told_to(29)))
    crash = failed(port.ask(1, told_to(24)))
    assert crash == Failure("crash", "it ended with signal SIGSEGV; stderr:\nto standard output")
    assert failed(port.ask(2, told_to(30))) == Failure("crash", "it ended with exit code 3")
    arrays_of(port.ask(3, told_to(0)))
    behind = failed(port.ask(4, told_to(11)))
    assert (behind.kind, behind.message[:30]) == ("out of bounds", "nsq_encode wrote behind packed")
    port.close()


def test_a_library_that_hangs(library: str) -> None:
    port = open_port(library, timeout=1.0)
    assert failed(port.ask(0, told_to(26))).kind == "hang"
    arrays_of(port.ask(1, told_to(0)))
    port.close()


def test_libraries_that_cannot_be_used(tmp_path: Path, library: str) -> None:
    text, empty = tmp_path / "libtext.so", tmp_path / "libempty.so"
    text.write_text("no library")
    with pytest.raises(ValueError, match=r"libtext.so cannot be loaded: "):
        open_port(str(text))
    source = tmp_path / "empty.c"
    source.write_text("int nothing(void) { return 0; }")
    compile_library(source, empty)
    with pytest.raises(ValueError, match=r"has none of the functions of nsq.h: nsq_encode, "):
        open_port(str(empty))


def test_a_library_without_some_functions(tmp_path: Path) -> None:
    """Another target may do what the library is not given for."""
    source = tmp_path / "one.c"
    source.write_text("int nsq_encode(void) { return 1; }")
    library = compile_library(source, tmp_path / "libone.so")
    port = open_port(str(library), f"{FUNCTIONS}:zeros")
    assert answered(port.ask(0, case())).status == REFUSED
    answer = answered(port.ask(1, attend_case()))
    assert (answer.status, answer.message) == (NOT_IMPLEMENTED, "the library has no nsq_attend")
    arrays_of(port.ask(2, decode_case(normal(3, 4), PCHAN)))
    port.close()
