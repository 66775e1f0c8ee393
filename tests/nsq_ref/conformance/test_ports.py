"""The ways to an implementation, and that the kit outlives whatever it meets there."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance import check, ports, worker
from nsq_ref.conformance.frames import Frame, read_frame, scheme_array, write_frame
from nsq_ref.conformance.operations import (
    DONE,
    FAILED,
    NOT_IMPLEMENTED,
    OPERATIONS,
    REFUSED,
    Answer,
    Case,
    Failure,
    Operation,
    request_of,
)
from nsq_ref.conformance.ports import Callables, Folder, Process, Stream, open_port
from tests.nsq_ref.test_codec import BFloat16Tensor, Tensor
from tests.ports import functions
from tests.support.compilers import compile_library

HERE = Path(__file__).parents[2] / "ports"
FUNCTIONS = str(HERE / "functions.py")
PCHAN = Scheme(separate_norm=False)
ALL_PARTS = Scheme(symmetric=False, block_size=2, sink_tokens=1, outlier_channels=1)
PART_NAMES = ("packed", "scale", "norm", "zero", "outlier_index", "outliers", "sinks")

ENDS_OF_STDERR = 5 * "line\n" + "...\n" + 4 * "line\n" + "out of memory"

rng = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return rng.standard_normal(shape, np.float32)


def case(operation: Operation = "encode", scheme: Scheme | None = None, **inputs: Any) -> Case:
    inputs = inputs or {"x": normal(3, 4)}
    return Case("case/0", operation, Scheme() if scheme is None else scheme, (), inputs)


def decode_case(x: Any, scheme: Scheme) -> Case:
    parts = nsq.quantize(x, scheme).parts
    return case("decode", scheme, **parts, shape=np.int32(x.shape))


def attend_case(**options: float) -> Case:
    key_scheme, value_scheme = Scheme(bits=8), Scheme(symmetric=False, magnitude="gain")
    keys, values = (
        nsq.quantize(normal(1, 5, 4), key_scheme),
        nsq.quantize(normal(1, 5, 6), value_scheme),
    )
    given = {"scale": 0.5, "causal": 1, "softcap": 0, "sliding_window": 0} | options
    return case(
        "attend",
        key_scheme,
        query=normal(2, 3, 4),
        **{f"keys.{name}": part for name, part in keys.parts.items()},
        **{"keys.shape": np.int32([1, 5, 4])},
        **{f"values.{name}": part for name, part in values.parts.items()},
        **{"values.shape": np.int32([1, 5, 6])},
        value_scheme=scheme_array(value_scheme),
        scale=np.float32([given["scale"]]),
        causal=np.int32([given["causal"]]),
        softcap=np.float32([given["softcap"]]),
        sliding_window=np.int32([given["sliding_window"]]),
    )


def stream_case(scheme: Scheme, steps: Any, x: Any = None, row: int = 0) -> Case:
    x = normal(2, 40, 4) if x is None else x
    return case("stream", scheme, x=x, steps=np.int32(steps), row=np.int32([row]))


def answered(answer: Answer | Failure) -> Answer:
    assert isinstance(answer, Answer), answer
    return answer


def arrays_of(answer: Answer | Failure) -> dict[str, Any]:
    assert answered(answer).status == DONE, answer
    return dict(answered(answer).arrays)


def failed(answer: Answer | Failure) -> Failure:
    assert isinstance(answer, Failure), answer
    return answer


def equal(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert (got[name].dtype, got[name].shape) == (expected[name].dtype, expected[name].shape)
        assert got[name].tobytes() == expected[name].tobytes(), name


def program(what: str, timeout: float = 30.0) -> Process:
    return Process(what, [sys.executable, str(HERE / "program.py"), what], timeout)


# --- Python functions, here and in a process of their own ---------------------------------------


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
        layout = worker.stream_layout(scheme, asked.inputs["steps"], row, 4, np.dtype(np.float32))
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
        return np.concatenate([x, x[0]])

    report = check(encode=stumbles, scheme="naive4", dtypes=["float32"])
    what = report.schemes[0].diagnoses[0].findings[0].what
    line = stumbles.__code__.co_firstlineno + 1
    assert what.startswith("valid input was refused: all the input array")
    assert what.endswith(f" (ValueError, test_ports.py line {line})")


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


# --- targets ------------------------------------------------------------------------------------


def test_a_link_to_a_program_is_run_by_its_own_name(tmp_path: Path) -> None:
    """As programs that look beside themselves, or go by their name, expect."""
    real, link = tmp_path / "real", tmp_path / "bin" / "right"
    real.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "program.py"} "$(basename "$0")"\n')
    real.chmod(0o755)
    link.parent.mkdir()
    link.symlink_to(real)
    port = open_port(str(link))
    arrays_of(port.ask(0, case()))
    port.close()


@pytest.mark.parametrize("name", ["libmine.so", "libmine.so.1", "libmine.so.1.2.3", "m.dylib"])
def test_names_of_libraries(tmp_path: Path, name: str) -> None:
    """Also where they are executable, as linkers make them."""
    (tmp_path / name).write_bytes(b"")
    (tmp_path / name).chmod(0o755)
    assert ports.target_kind(str(tmp_path / name)) == "library"


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ({}, "nothing to check was given"),
        ({"encode": "./no_such_program"}, "there is no file ./no_such_program"),
        ({"encode": "no/such/file.py:encode"}, "there is no file no/such/file.py"),
        ({"encode": FUNCTIONS}, "functions.py:encode"),
        ({"encode": str(HERE)}, "is a folder; name what is in it, or judge the answers"),
        ({"encode": ""}, "a target is empty"),
        ({"encode": "nsq_ref:quantize", "decode": ""}, "a target is empty"),
        ({"encode": "nsq_ref:"}, "names no Python function"),
        ({"encode": "no_such_module:f"}, "no_such_module cannot be imported: ModuleNotFoundError"),
        ({"encode": "nsq_ref:no_such"}, "nsq_ref has no no_such"),
        ({"encode": str(HERE / "library.c")}, "is not executable; for a program, run chmod"),
        ({"encode": "nsq_ref:quantize", "custom_ops": "a.so"}, "is for ONNX models"),
        ({"encode": "/bin/sh", "decode": "nsq_ref:dequantize"}, "given first and alone"),
        ({"decode": "/bin/sh"}, "given first and alone"),
        ({"encode": "/bin/true"}, "/bin/true did not start: it ended with exit code 0"),
    ],
)
def test_targets_that_make_no_sense(targets: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        open_port(**targets)
    assert says in str(error.value)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_bytes(b"\0\1\2 no program")
    file.chmod(0o755)
    with pytest.raises(ValueError, match="mine cannot be run: Exec format error"):
        open_port(str(file))


def test_an_executable_is_a_program(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text(f"#!/bin/sh\nexec {sys.executable} {HERE / 'program.py'} right\n")
    file.chmod(0o755)
    port = open_port(str(file))
    x = normal(1, 1)
    equal(arrays_of(port.ask(5, case(x=x))), {"packed": x.view(np.uint8)})
    port.close()


# --- programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("crashes", "crash", "it ended with signal SIGSEGV"),
        ("exits", "crash", "it ended with exit code 3; stderr:\n" + ENDS_OF_STDERR),
        ("closes its output", "crash", "it closed its output without an answer"),
        ("writes text", "garbage", r"read b'norm = 3.5\xff\n'"),
        ("writes text for ever", "garbage", "read b'no end"),
        ("claims much", "garbage", "would take"),
        ("stops within an answer", "crash", "it ended with exit code 2"),
        ("answers another case", "garbage", "case 4 was asked, and case 5 answered"),
        ("gives no status", "garbage", "has case and status, int32 [1]; this one has {'case': "),
        ("gives a status that is none", "garbage", "status 9 is none; it is 0 to 3"),
        ("says that it failed", "garbage", r"no \xe9"),
        ("leaves a child in a session of its own", "crash", "it ended with exit code 8"),
    ],
)  # fmt: skip
def test_programs_that_fail(what: str, kind: str, says: str) -> None:
    """Each failure is told for what it is."""
    port = program(what)
    answer = failed(port.ask(4, case()))
    assert (answer.kind, says in answer.message) == (kind, True), answer
    port.close()


def test_children_end_with_the_program(tmp_path: Path) -> None:
    """A child that holds the pipes does not hold up the kit, and is killed."""
    watched = tmp_path / "fifo"
    os.mkfifo(watched)
    reader = os.open(watched, os.O_RDONLY | os.O_NONBLOCK)
    port = Process(
        "port", [sys.executable, str(HERE / "program.py"), "leaves a child", str(watched)]
    )
    assert failed(port.ask(0, case())) == Failure("crash", "it ended with exit code 7")
    os.set_blocking(reader, True)
    assert os.read(reader, 5) == b""
    os.close(reader)
    port.close()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("hangs", "no answer in 1 s; stderr:\nwaiting for a lock"),
        ("reads nothing", "no answer in 1 s"),
        ("answers without reading", "it answered, but did not read all of the case in 1 s"),
    ],
)
def test_programs_that_hang(what: str, says: str) -> None:
    port = program(what, timeout=1.0)
    answer = failed(port.ask(0, case(x=normal(512, 1024))))
    port.close()
    assert (answer.kind, answer.message) == ("hang", says)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("exits at the start", "exit code 1; stderr:\nno licence was found"),
        ("greets", "what it wrote is no frame: a frame begins with b'NSQ1'; read b'Welcome to the"),
        ("cannot start", "no GPU"),
        ("answers the header", "its first frame has ['hello']; it should be a copy"),
    ],
)  # fmt: skip
def test_programs_that_do_not_start(what: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"{what} did not start: ") as error:
        program(what)
    assert says in str(error.value)


def test_programs_that_are_slow_to_start() -> None:
    argv = [sys.executable, str(HERE / "program.py"), "is slow to start"]
    with pytest.raises(ValueError, match="slow did not start: no answer in 1 s"):
        Process("slow", argv, start_timeout=1.0)


def test_large_frames_in_both_directions() -> None:
    """A program that answers before it has read the case does not block the kit."""
    port = program("writes before it reads")
    assert arrays_of(port.ask(0, case(x=normal(1024, 1024))))["packed"].nbytes == 1 << 22
    port.close()
    port = program("right")
    x = normal(1024, 1024)
    equal(arrays_of(port.ask(0, case(x=x))), {"packed": x.view(np.uint8)})
    port.close()


def test_output_behind_an_answer() -> None:
    port = program("goes on")
    arrays_of(port.ask(0, case()))
    answer = failed(port.ask(1, case()))
    assert (answer.kind, r"read b'done.\n" in answer.message) == ("garbage", True), answer
    port.close()


def test_a_program_is_given_up_after_three_failures_of_an_operation() -> None:
    port = program("crashes at odd cases")
    kinds = [port.ask(number, case()) for number in range(8)]
    done = [isinstance(one, Answer) for one in kinds]
    assert done == [True, False, True, False, True, False, False, False]
    last = "not asked: 3 earlier cases of encode failed"
    assert kinds[6] == kinds[7] == Failure("missing", last)
    assert failed(port.ask(9, stream_case(Scheme(block_size=2), [[0, 1, 1]]))).kind == "crash"
    port.close()


def test_a_program_that_does_not_start_again(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text(f"#!/bin/sh\nexec {sys.executable} {HERE / 'program.py'} crashes\n")
    file.chmod(0o755)
    port = Process("mine", [str(file)])
    assert failed(port.ask(0, case())).kind == "crash"
    file.unlink()
    answer = failed(port.ask(1, case()))
    assert "it did not start again: " in answer.message
    assert "No such file" in answer.message
    port.close()


def test_close_ends_the_program() -> None:
    port = program("tells its process")
    (process,) = arrays_of(port.ask(0, case()))["packed"].tolist()
    port.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    port.close()


# --- the run, files, streams --------------------------------------------------------------------


def stream_of(*frames: Frame, behind: bytes = b"") -> io.BytesIO:
    stream = io.BytesIO()
    for frame in frames:
        write_frame(stream, frame)
    stream.write(behind)
    stream.seek(0)
    return stream


def test_the_header_tells_the_run() -> None:
    schemes = [("pchan4", PCHAN), ("all", ALL_PARTS)]
    hello = ports.Hello(7, schemes, ["decode", "stream"], ["bfloat16"])
    assert ports.read_hello(stream_of(ports.hello_frame(*hello))) == hello


def hello_with(**changes: Any) -> Frame:
    fields = json.loads(ports.hello_frame()["hello"].tobytes()) | changes
    return {"hello": np.frombuffer(json.dumps(fields).encode(), np.uint8)}


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (stream_of(), "the stream is empty"),
        (stream_of(behind=b"hello, world"), "a frame begins with"),
        (stream_of({"case": np.int32([0])}), r"a frame of \['case'\]"),
        (stream_of({"hello": np.zeros(3, np.uint8)}), "not one that nsq gen wrote"),
        (stream_of({"hello": np.frombuffer(b"[3]", np.uint8)}), "not one that nsq gen wrote"),
        (stream_of({"hello": np.frombuffer(b"\xff{}", np.uint8)}), "not one that nsq gen wrote"),
        (stream_of(hello_with(specVersion="NSQ-9")), "the run is of NSQ-9 and protocol 1"),
        (stream_of(hello_with(protocol=2)), "the run is of NSQ-1 and protocol 2"),
        (stream_of(hello_with(schemes=[{"name": "x"}])), "a scheme has the fields"),
        (stream_of(hello_with(operations=["paint"])), "operations of the run are"),
        (stream_of(hello_with(seed="7")), "the seed of the run is '7'"),
        (stream_of(hello_with(seed=-1)), "the seed of the run is -1"),
        (stream_of({"hello": np.frombuffer(b"[" * 10**5, np.uint8)}), "not one that nsq gen wrote"),
        (
            stream_of(hello_with(schemes=[{"name": 3, **Scheme().to_dict()}])),
            r"the schemes of the run are named \[3\]",
        ),
        (stream_of(hello_with(dtypes="float32")), "dtypes of the run are"),
    ],
)
def test_headers_that_are_none(stream: io.BytesIO, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ports.read_hello(stream)


def test_files(tmp_path: Path) -> None:
    """Requests go to files, and each answer is a file of the same name."""
    cases = [case(x=normal(1, 4)) for _ in range(8)]
    ports.write_files(tmp_path / "inputs", ports.hello_frame(3), cases)
    with (tmp_path / "inputs" / "header.nsq").open("rb") as file:
        assert ports.read_hello(file).seed == 3
    with (tmp_path / "inputs" / "00002.nsq").open("rb") as file:
        equal(read_frame(file), request_of(2, cases[2]))

    outputs = tmp_path / "outputs"
    with pytest.raises(ValueError, match="there is no directory"):
        Folder("mine", outputs)
    outputs.mkdir()
    right = {"packed": np.uint8([3])}
    frame = stream_of(ports.reply_of(0, Answer(DONE, right, "well"))).getvalue()
    for number, data in enumerate([frame, frame, b"", b"text", frame[:-1], frame + b"\n"]):
        (outputs / f"{number:05d}.nsq").write_bytes(data)
    (outputs / "00006.nsq").mkdir()
    os.mkfifo(outputs / "00008.nsq")
    port = Folder("mine", outputs)
    equal(arrays_of(port.ask(0, cases[0])), right)
    answers = [failed(port.ask(number, cases[0])) for number in range(1, 9)]
    for answer, (kind, says) in zip(
        answers,
        [
            ("garbage", "case 1 was asked, and case 0 answered"),
            ("garbage", "00002.nsq is empty"),
            ("garbage", "00003.nsq cannot be read: a frame begins with"),
            ("garbage", "00004.nsq cannot be read: the stream ended 1 bytes before"),
            ("garbage", "00005.nsq goes on behind its first frame"),
            ("garbage", "00006.nsq cannot be read: "),
            ("missing", "there is no 00007.nsq"),
            ("garbage", "00008.nsq cannot be read: it is no file"),
        ],
        strict=True,
    ):
        assert (answer.kind, says in answer.message) == (kind, True), answer
    port.close()


def test_a_stream() -> None:
    """Answers come in order; what is left out or cut off is told by its place."""
    replies = [ports.reply_of(number, Answer(DONE, {})) for number in (0, 1, 3)]
    refused = ports.reply_of(4, Answer(REFUSED, {}, "no"))
    bounds = ports.reply_of(5, Failure("out of bounds", "wrote behind packed"))
    port = Stream("mine", stream_of(*replies, refused, bounds, behind=b"NSQ1\1"))
    answers = [port.ask(number, case()) for number in range(8)]
    assert [getattr(one, "status", None) for one in answers[:5]] == [0, 0, None, 0, REFUSED]
    assert answers[2] == Failure("missing", "after case 1 the stream goes on with case 3")
    assert answers[5] == Failure("out of bounds", "wrote behind packed")
    ended = "the stream ended after case 5 in the midst of an answer (the stream ended 3 bytes "
    assert answers[6] == answers[7]
    assert failed(answers[6]).message.startswith(ended)
    assert failed(Stream("mine", stream_of()).ask(0, case())).message == (
        "the stream ended before any answer"
    )
    port.close()


def test_garbage_in_a_stream() -> None:
    """It is told of the case behind whose answer it comes, and the next one is judged."""
    first, second = (stream_of(ports.reply_of(n, Answer(DONE, {}))).getvalue() for n in (0, 1))
    port = Stream("mine", io.BytesIO(first + b"some text\n" + second))
    kinds = [getattr(port.ask(number, case()), "kind", "") for number in range(4)]
    assert kinds == ["garbage", "", "missing", "missing"]


def test_a_pipeline() -> None:
    """What nsq gen writes, a port answers: the worker's loop on streams."""
    requests, answers = io.BytesIO(), io.BytesIO()
    x = normal(2, 4)
    cases = [case(x=x), case(x=np.float32([[np.inf]])), decode_case(x, PCHAN)]
    ports.write_requests(requests, ports.hello_frame(5, [("nsep+pchan4", Scheme())]), cases)
    requests.seek(0)
    worker.serve({"encode": Callables("f", encode=functions.encode)}, requests, answers)
    answers.seek(0)
    assert ports.read_hello(answers).schemes == [("nsep+pchan4", Scheme())]
    port = Stream("mine", answers)
    equal(arrays_of(port.ask(0, cases[0])), nsq.quantize(x).parts)
    statuses = [answered(port.ask(number, cases[number])).status for number in (1, 2)]
    assert statuses == [REFUSED, NOT_IMPLEMENTED]


def test_failures_survive_frames() -> None:
    for kind in ("hang", "crash", "garbage", "out of bounds", "missing"):
        failure = Failure(kind, "why")  # type: ignore[arg-type]
        frame = ports.reply_of(2, failure)
        assert frame["status"].tolist() == [FAILED]
        assert Stream("s", stream_of(frame)).ask(2, case()) == failure


# --- libraries ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("library") / "libport.so"
    return str(compile_library(HERE / "library.c", output))


@pytest.fixture(scope="module")
def in_c(library: str) -> worker.Library:
    """The library in this process, which the guards protect from all that it is told below."""
    return worker.Library(library)


def told_to(what: int, kind: Any = np.float32) -> Case:
    x = np.zeros((5, 4), kind)
    x[0, 0] = what
    return case("encode", ALL_PARTS, x=x)


def test_outputs_of_a_library(in_c: worker.Library) -> None:
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
def test_what_a_library_is_told(in_c: worker.Library, kind: Any, number: int) -> None:
    """I1: dtype and shape, leading axes merged; the parts come back with the axes of x."""
    x = np.zeros((2, 3, 5, 8), kind)
    got = arrays_of(in_c.ask(0, case("encode", Scheme(), x=x)))
    assert got["packed"].ravel()[:4].tolist() == [number, 6, 5, 8]
    assert got["packed"].shape == (2, 3, 5, 4)
    assert got["scale"].tobytes() == b"\xa5" * got["scale"].nbytes


def test_a_library_decodes(in_c: worker.Library) -> None:
    """D1."""
    scheme = Scheme(separate_norm=False, scale_dtype="float32")
    x = normal(2, 3, 7, 5)
    got = arrays_of(in_c.ask(0, decode_case(x, scheme)))
    equal(got, {"x_hat": nsq.dequantize(nsq.quantize(x, scheme))})
    assert answered(in_c.ask(0, decode_case(x, Scheme()))).status == NOT_IMPLEMENTED


def test_a_library_attends(in_c: worker.Library) -> None:
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
def test_a_library_streams(in_c: worker.Library, tokens: int) -> None:
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


@pytest.mark.parametrize("number", range(7))
def test_writing_beside_a_buffer(in_c: worker.Library, number: int) -> None:
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
def test_what_a_library_may_not_do(in_c: worker.Library, what: int, kind: Any, says: str) -> None:
    assert failed(in_c.ask(0, told_to(what))) == Failure(kind, says)


def test_what_a_library_may_do(in_c: worker.Library) -> None:
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


# --- ONNX models --------------------------------------------------------------------------------


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], values: Any) -> str:
    constants = [
        helper.make_tensor(name, kind, [len(value)], value) for name, kind, value in values
    ]
    graph = helper.make_graph(nodes, "port", inputs, outputs, constants)
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return str(path)


def decode_model(path: Path, scale_type: int) -> str:
    """D1 of pchan4 for an even number of channels."""
    node = helper.make_node
    nodes = [
        node("BitwiseAnd", ["packed", "fifteen"], ["low"]),
        node("BitShift", ["packed", "four"], ["high"], direction="RIGHT"),
        node("Unsqueeze", ["low", "last"], ["even"]),
        node("Unsqueeze", ["high", "last"], ["odd"]),
        node("Concat", ["even", "odd"], ["pairs"], axis=-1),
        node("Reshape", ["pairs", "rows"], ["raw"]),
        node("Cast", ["raw"], ["numbers"], to=TensorProto.FLOAT),
        node("Sub", ["numbers", "offset"], ["codes"]),
        node("Cast", ["scale"], ["factor"], to=TensorProto.FLOAT),
        node("Mul", ["codes", "factor"], ["x_hat"]),
    ]
    tensor = helper.make_tensor_value_info
    values = [
        ("fifteen", TensorProto.UINT8, [15]), ("four", TensorProto.UINT8, [4]),
        ("last", TensorProto.INT64, [-1]), ("rows", TensorProto.INT64, [0, -1]),
        ("offset", TensorProto.FLOAT, [8.0]),
    ]  # fmt: skip
    inputs = [
        tensor("packed", TensorProto.UINT8, ["tokens", "row"]),
        tensor("scale", scale_type, [1, "head_dim"]),
    ]
    outputs = [tensor("x_hat", TensorProto.FLOAT, ["tokens", "head_dim"])]
    return save(path, nodes, inputs, outputs, values)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_a_model_decodes(tmp_path: Path, name: Any) -> None:
    """D1: in every bit; other schemes it does not implement, and says why."""
    kind = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}.get(name, 1)
    scheme = Scheme(separate_norm=False, scale_dtype=name)
    port = open_port(decode=decode_model(tmp_path / "decode.onnx", kind))
    x = normal(9, 6)
    got = arrays_of(port.ask(0, decode_case(x, scheme)))
    equal(got, {"x_hat": nsq.dequantize(nsq.quantize(x, scheme))})
    others = {
        "the model has no input norm": decode_case(x, Scheme(scale_dtype=name)),
        "the model takes packed of shape ['tokens', 'row']": decode_case(normal(2, 9, 6), scheme),
        "the model takes scale of shape [1, 'head_dim']": decode_case(
            x, Scheme(separate_norm=False, block_size=2, scale_dtype=name)
        ),
        f"the model takes scale as {name}": decode_case(
            x,
            Scheme(separate_norm=False, scale_dtype="float16" if name != "float16" else "float32"),
        ),
        "the model takes packed, which the case does not have": case("decode", PCHAN, x=x),
    }
    for says, asked in others.items():
        answer = answered(port.ask(1, asked))
        assert (answer.status, answer.message) == (NOT_IMPLEMENTED, says)
    port.close()


def test_a_model_encodes(tmp_path: Path) -> None:
    """Outputs have the names of parts; bfloat16 comes through; errors of the runtime refuse."""
    tensor = helper.make_tensor_value_info
    path = save(
        tmp_path / "encode.onnx",
        [
            helper.make_node("Identity", ["x"], ["sinks"]),
            helper.make_node("Reshape", ["x", "shape"], ["scale"]),
        ],
        [tensor("x", TensorProto.BFLOAT16, None)],
        [tensor("sinks", TensorProto.BFLOAT16, None), tensor("scale", TensorProto.BFLOAT16, None)],
        [("shape", TensorProto.INT64, [2, 6])],
    )
    port = open_port(path)
    x = normal(3, 4).astype(ml_dtypes.bfloat16)
    equal(arrays_of(port.ask(0, case(x=x))), {"sinks": x, "scale": x.reshape(2, 6)})
    refused = answered(port.ask(1, case(x=x[:, :3])))
    assert (refused.status, "reshaped" in refused.message) == (REFUSED, True), refused
    answer = answered(port.ask(2, case(x=normal(3, 4))))
    assert (answer.status, answer.message) == (NOT_IMPLEMENTED, "the model takes x as bfloat16")
    port.close()


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_text("no model")
    with pytest.raises(ValueError, match=r"broken.onnx cannot be loaded: "):
        open_port(str(broken))
    good = decode_model(tmp_path / "good.onnx", TensorProto.FLOAT16)
    with pytest.raises(ValueError, match=r"custom_ops: there is no file none.so"):
        open_port(decode=good, custom_ops="none.so")
    with pytest.raises(ValueError, match=r"good.onnx cannot be loaded: .*broken.onnx"):
        open_port(decode=good, custom_ops=str(broken))
