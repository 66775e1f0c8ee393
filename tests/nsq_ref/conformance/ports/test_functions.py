"""Python functions as ports, here and in a process of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance import check, ports
from nsq_ref.conformance.operations import (
    NOT_IMPLEMENTED,
    OPERATIONS,
    REFUSED,
)
from nsq_ref.conformance.ports import (
    Callables,
    Stream,
    open_port,
)
from nsq_ref.conformance.ports.library import stream_layout
from tests.nsq_ref.test_codec import BFloat16Tensor, Tensor
from tests.ports import functions
from tests.support.asked import (
    ALL_PARTS,
    FUNCTIONS,
    PCHAN,
    answered,
    arrays_of,
    attend_case,
    case,
    decode_case,
    equal,
    failed,
    normal,
    stream_case,
    stream_of,
)


@pytest.fixture(scope="module")
def right() -> Any:
    names = {operation: f"{FUNCTIONS}:{operation}" for operation in OPERATIONS}
    port = open_port(**names)
    yield port
    port.close()


SCHEMES = [
    Scheme(), PCHAN, ALL_PARTS, Scheme.named("naive3"),
    Scheme(scale_dtype="bfloat16", norm_dtype="float32", sink_tokens=9),
]  # fmt: skip


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_behind_pipes(right: Any, scheme: Scheme, kind: Any) -> None:
    """I1 K1: arrays come back as the function returned them, empty ones and bfloat16 included."""
    x = normal(2, 5, 4).astype(kind)
    parts = nsq.quantize(x, scheme).parts
    equal(arrays_of(right.ask(0, case("encode", scheme, x=x))), parts)
    decoded = {"x_hat": nsq.dequantize(nsq.quantize(x, scheme))}
    equal(arrays_of(right.ask(1, decode_case(x, scheme))), decoded)


def test_attend_behind_pipes(right: Any) -> None:
    """A1 A2: options reach the function; 0 stands for no softcap and no window."""
    for options in ({}, {"softcap": 2.0}, {"sliding_window": 2}, {"causal": 0, "scale": 0.25}):
        asked = attend_case(**options)
        here = Callables("here", attend=functions.attend).ask(0, asked)
        equal(arrays_of(right.ask(0, asked)), arrays_of(here))
    seen: dict[str, Any] = {}

    def attend(query: Any, keys: Any, values: Any, *schemes: Scheme, **options: Any) -> Any:
        seen.update(
            options, shapes=(keys["shape"], values["shape"]), bits=[s.bits for s in schemes]
        )
        return query

    Callables("here", attend=attend).ask(0, attend_case(softcap=2.0))
    assert seen == {
        "scale": 0.5, "causal": True, "softcap": 2.0, "sliding_window": None,
        "shapes": ((1, 5, 4), (1, 5, 6)), "bits": [8, 4],
    }  # fmt: skip


STEPS = [
    [[0, 3, 1]],
    [[0, 9, 2], [1, 5, 1], [0, 4, 4]],
    [[0, 9, 2], [1, 1, 0], [0, 6, 1], [0, 7, 7]],
    [[0, 20, 20], [1, 10, 30]],
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sinks", [0, 2])
def test_stream_behind_pipes(right: Any, sinks: int, steps: Any) -> None:
    """B1 K1 C1: what is stored at the end has the shapes that follow from the steps."""
    scheme = Scheme(block_size=4, sink_tokens=sinks)
    for row in (0, 1):
        asked = stream_case(scheme, steps, row=row)
        got = arrays_of(right.ask(0, asked))
        layout = stream_layout(scheme, asked.inputs["steps"], row, 4, np.dtype(np.float32))
        shapes = {name: (part.shape, part.dtype) for name, part in got.items() if part.size}
        assert shapes == {name: tuple(f) for name, f in layout.items() if 0 not in f.shape}


def test_what_a_function_may_return() -> None:
    """A mapping, a Quantized, an object with attributes; DLPack, bfloat16 included (I1)."""
    x = normal(3, 4)
    parts = nsq.quantize(x).parts
    for function in (functions.encode, functions.attributes):
        equal(arrays_of(Callables("f", encode=function).ask(0, case(x=x))), parts)
    wide = x.astype(ml_dtypes.bfloat16)
    tensors = {"sinks": BFloat16Tensor(wide), "scale": Tensor(x), "zero": None}
    got = arrays_of(Callables("f", encode=lambda x, scheme: tensors).ask(0, case(x=x)))
    equal(got, {"sinks": wide, "scale": x})


def test_what_is_returned_is_copied() -> None:
    """A function that answers from a buffer that it uses again spoils no earlier answer."""
    buffer = np.zeros((1, 4), np.float32)

    def decode(parts: Any, scheme: Scheme, shape: Any) -> Any:
        buffer[...] += 1
        return buffer

    port = Callables("f", decode=decode)
    first = arrays_of(port.ask(0, decode_case(normal(1, 4), Scheme())))
    port.ask(1, decode_case(normal(1, 4), Scheme()))
    assert first["x_hat"].tolist() == [[1] * 4]


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("writes_to_x", "out of bounds", "x was written to"),
        ("a_list", "garbage", "encode returned list; return a mapping"),
        ("float64_scale", "garbage", "scale is float64 [1, 4]; the scheme stores float16"),
        ("an_object", "garbage", "norm is object []; the scheme stores float16"),
        ("wrong_name", "garbage", "a part 'codes'; the parts are packed, scale,"),
    ],
)
def test_what_a_function_may_not_do(name: str, kind: str, says: str) -> None:
    answer = failed(Callables("f", encode=getattr(functions, name)).ask(0, case()))
    assert (answer.kind, says in answer.message) == (kind, True), answer


def test_what_a_function_may_not_do_behind_pipes() -> None:
    port = open_port(f"{FUNCTIONS}:writes_to_x")
    answer = port.ask(0, case())
    port.close()
    assert answer == Callables("f", encode=functions.writes_to_x).ask(0, case())


def test_parts_may_not_be_written_to() -> None:
    answer = Callables("f", decode=functions.writes_to_packed).ask(
        0, decode_case(normal(3, 4), PCHAN)
    )
    assert failed(answer).message.startswith("packed was written to")


def test_dtypes_of_single_arrays_are_named() -> None:
    """D1: the result of decode is float32, and a float64 one is not silently rounded."""
    port = Callables("f", decode=lambda parts, scheme, shape: np.zeros(shape))
    answer = failed(port.ask(0, decode_case(normal(3, 4), PCHAN)))
    assert answer.message == "x_hat is float64 [3, 4]; it should be float32"


def test_answers_too_large_for_a_frame_are_not_copied() -> None:
    """A view of one byte as a terabyte is named before anybody asks for the memory."""
    answer = failed(Callables("f", encode=functions.endless).ask(0, case()))
    assert answer.kind == "garbage"
    assert answer.message == (
        "packed is uint8 [1048576, 1048576], more than the 1073741824 bytes of any answer"
    )


@pytest.mark.parametrize("how", ["read-only", "Fortran", "strided", "negative strides"])
def test_memory_of_any_layout_is_taken(how: str) -> None:
    def laid_out(part: Any) -> Any:
        if how == "Fortran":
            return np.asfortranarray(part)
        if how == "strided":
            return np.repeat(part, 2, axis=-1)[..., ::2]
        if how == "negative strides":
            return np.ascontiguousarray(part[..., ::-1])[..., ::-1]
        part = part.copy()
        part.flags.writeable = False
        return part

    port = Callables("f", encode=lambda x, scheme: {
        name: laid_out(part) for name, part in nsq.quantize(x, scheme).parts.items()
    })  # fmt: skip
    one = case(x=normal(3, 5))
    stream = stream_of(ports.reply_of(0, port.ask(0, one)))
    equal(arrays_of(Stream("s", stream).ask(0, one)), nsq.quantize(one.inputs["x"]).parts)


def test_another_byte_order_is_no_dtype_of_a_part() -> None:
    port = Callables("f", encode=lambda x, scheme: {
        name: part.astype(part.dtype.newbyteorder(">"))
        for name, part in nsq.quantize(x, scheme).parts.items()
    })  # fmt: skip
    assert "scale is >f2 [1, 4]; the scheme stores float16" in failed(port.ask(0, case())).message


def test_wrong_shapes_are_left_to_the_judge() -> None:
    port = Callables("f", encode=functions.wrong_shape)
    assert arrays_of(port.ask(0, case()))["packed"].shape == (1, 2, 3)


def test_refusals(right: Any) -> None:
    """I2: ValueError and OverflowError refuse, and the message comes along."""
    nan = case(x=np.float32([[1, np.nan]]))
    for port in (right, Callables("f", encode=functions.encode)):
        answer = answered(port.ask(0, nan))
        assert (answer.status, answer.message[:14]) == (REFUSED, "x[0, 1] is nan")
    answer = answered(Callables("f", encode=functions.too_large).ask(0, case()))
    (line,) = (
        n
        for n, text in enumerate(Path(FUNCTIONS).read_text().splitlines(), 1)
        if "x is too large" in text
    )
    where = f"(OverflowError, functions.py line {line})"
    assert (answer.status, answer.message) == (REFUSED, f"x is too large {where}")


def test_an_error_that_reads_as_a_refusal_says_where_it_is() -> None:
    """A bug in a port may raise what refuses: the report leads to its line."""

    def stumbles(x: Any, scheme: Scheme) -> Any:
        return np.concatenate([x, x[..., 0]])

    report = check(encode=stumbles, scheme="naive4", dtypes=["float32"])
    what = report.schemes[0].diagnoses[0].findings[0].what
    line = stumbles.__code__.co_firstlineno + 1
    assert what.startswith("valid input was refused: all the input array")
    assert what.endswith(f" (ValueError, test_functions.py line {line})")


def test_what_is_not_implemented() -> None:
    answer = answered(Callables("f", encode=functions.not_yet).ask(0, case()))
    assert (answer.status, answer.message) == (NOT_IMPLEMENTED, "later")
    answer = answered(
        Callables("f", encode=functions.encode).ask(0, decode_case(normal(1, 4), PCHAN))
    )
    assert answer.status == NOT_IMPLEMENTED
    port = open_port(f"{FUNCTIONS}:encode")
    answer = answered(port.ask(0, decode_case(normal(1, 4), PCHAN)))
    port.close()
    assert (answer.status, answer.message) == (NOT_IMPLEMENTED, "nothing was given for decode")


def test_other_exceptions_are_not_hidden() -> None:
    with pytest.raises(KeyError, match="no such key"):
        Callables("f", encode=functions.raises).ask(0, case())


def test_prints_do_not_get_among_the_frames() -> None:
    port = open_port(f"{FUNCTIONS}:prints")
    x = normal(3, 4)
    equal(arrays_of(port.ask(0, case(x=x))), nsq.quantize(x).parts)
    port.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", ("it ended with exit code 1;", "KeyError: 'no such key'", "in raises")),
        ("exits", ("it ended with exit code 4",)),
        ("exits_at_once", ("it ended with exit code 5",)),
        ("crashes", ("it ended with signal SIGSEGV",)),
        ("leaves_a_child", ("it ended with exit code 6",)),
        ("closes_all_files", ("it closed its output without an answer",)),
    ],
)
def test_functions_that_end_the_process(name: str, says: tuple[str, ...]) -> None:
    port = open_port(f"{FUNCTIONS}:{name}", f"{FUNCTIONS}:zeros")
    answer = failed(port.ask(0, case()))
    assert answer.kind == "crash"
    assert all(text in answer.message for text in says), answer.message
    arrays_of(port.ask(1, decode_case(normal(3, 4), PCHAN)))
    port.close()


def test_a_function_that_hangs() -> None:
    port = open_port(f"{FUNCTIONS}:hangs", timeout=1.0)
    answer = failed(port.ask(0, case()))
    port.close()
    assert (answer.kind, answer.message[:16]) == ("hang", "no answer in 1 s")


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        (
            "import no_such_module",
            "encode",
            "ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def encode(:", "encode", "SyntaxError: "),
        ("def encode(x, scheme): ...", "decode", "port.py has no decode"),
        ("encode = 3", "encode", "is int, which cannot be called"),
        ("raise RuntimeError('no GPU')", "encode", "RuntimeError: no GPU"),
        ("import sys; sys.exit(9)", "encode", "it ended with exit code 9"),
    ],
)
def test_modules_that_cannot_be_used(tmp_path: Path, source: str, name: str, says: str) -> None:
    file = tmp_path / "port.py"
    file.write_text(source)
    with pytest.raises(ValueError, match="did not start") as error:
        open_port(f"{file}:{name}")
    assert says in str(error.value)


def test_a_function_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def answer(): return {'packed': b'', 'none': 0}['packed']")
    (tmp_path / "port.py").write_text(
        "import helper, numpy\n"
        "def encode(x, scheme): return {'packed': numpy.frombuffer(helper.answer(), 'u1')}\n"
    )
    port = open_port(f"{tmp_path / 'port.py'}:encode")
    assert arrays_of(port.ask(0, case()))["packed"].shape == (0,)
    port.close()


def test_files_named_like_modules_are_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those beside a port nor the port itself replace what the worker imports."""
    for name in ("json.py", "typing.py", "ctypes.py", "signal.py", "ml_dtypes.py"):
        (tmp_path / name).write_text("raise ImportError('not this one')")
    for name in ("numpy.py", "mine.py"):
        (tmp_path / name).write_text(
            "import sys\ndef encode(x, scheme):\n"
            "    return sys.modules['nsq_ref'].quantize(x, scheme)\n"
        )
    monkeypatch.chdir(tmp_path)
    for target in ("mine:encode", "mine.py:encode", "numpy.py:encode"):
        port = open_port(target)
        assert list(arrays_of(port.ask(0, case()))) == ["packed", "scale", "norm"]
        port.close()
