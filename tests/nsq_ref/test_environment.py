"""Results do not depend on what others do to the floating-point environment of a thread."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from nsq_ref import KVCache, Scheme, attention, bounds, dequantize, environment, metrics, quantize
from nsq_ref.environment import default_environment, in_default_environment, is_default_environment

LIBM = ctypes.CDLL(None)
MACHINE = os.uname().machine.replace("arm64", "aarch64")
# How fesetround names the roundings, and where and how fenv_t says that small floats become 0.
UPWARD, DOWNWARD, TOWARD_ZERO, WORD, FLUSH = {
    "x86_64": (0x800, 0x400, 0xC00, 7, 0x8040),
    "aarch64": (0x400000, 0x800000, 0xC00000, 0, 1 << 24),
}[MACHINE]

SUBNORMAL = np.random.default_rng(0).standard_normal((2, 6, 40, 8)).astype(np.float32)
SUBNORMAL[0] *= np.float32(3e-39)
SCHEME = Scheme.named("streaming4")
SMALL = Scheme(scale_dtype="float32", separate_norm=False)


def flush() -> None:
    state = (ctypes.c_uint32 * 64)()
    LIBM.fegetenv(state)
    state[WORD] |= FLUSH
    LIBM.fesetenv(state)


def flush_by_onnxruntime() -> None:
    """The first session of a process that asks for it does this, and never undoes it."""
    kind = onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, kind, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    onnxruntime.InferenceSession(model.SerializeToString(), options)


CHANGES: dict[str, Callable[[], Any]] = {
    "flush": flush,
    "upward": lambda: LIBM.fesetround(UPWARD),
    "downward": lambda: LIBM.fesetround(DOWNWARD),
    "toward zero": lambda: LIBM.fesetround(TOWARD_ZERO),
}


def in_thread(work: Callable[[], Any]) -> Any:
    """Run in a thread of its own, as the environment of this one is not to be spoilt."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def everything() -> Iterator[bytes]:
    """Bytes of what the public functions return."""
    for scheme in (
        SMALL,
        Scheme(norm_dtype="float32"),
        SCHEME,
        Scheme(axis="token", bits=3, magnitude="lsq"),
    ):
        for x in SUBNORMAL, SUBNORMAL[1].astype(np.float16), SUBNORMAL[1].astype(np.float64):
            quantized = quantize(x, scheme)
            yield from (part.tobytes() for part in quantized.parts.values())
            yield dequantize(quantized).tobytes()
            certificate = bounds.certificate(quantized)
            yield certificate.relative.tobytes()
            yield certificate.logit(np.ones((6, 1, 8))).tobytes()
            yield bounds.encoder_bounds(x, quantized).relative.tobytes()
            yield attention.reach(quantized).tobytes()
        yield str(bounds.a_priori(scheme, 8)).encode()
    for backend in ("numpy", "oracle"):
        quantized = quantize(SUBNORMAL[:, :1, :4], SMALL, backend)
        yield quantized.packed.tobytes()
        yield dequantize(quantized, backend=backend).tobytes()
    yield quantize(SUBNORMAL.astype(ml_dtypes.bfloat16), SMALL).packed.tobytes()
    cache = KVCache(2, 6, 8, Scheme(block_size=16), Scheme(block_size=16))
    cache.append(SUBNORMAL, SUBNORMAL)
    cache.crop(37)
    for array in (*cache.dequantize(), *cache.attend(SUBNORMAL[:, :, :2], return_weights=True)):
        yield array.tobytes()
    for array in attention.attend(SUBNORMAL[:, :, :2], SUBNORMAL, SUBNORMAL):
        yield array.tobytes()
    for array in attention.tolerance(SUBNORMAL[:, :, :2], SUBNORMAL, SUBNORMAL):
        yield array.tobytes()
    yield metrics.cosine_similarity(SUBNORMAL, SUBNORMAL[::-1]).tobytes()
    yield np.float64(metrics.relative_error(SUBNORMAL, SUBNORMAL[::-1])).tobytes()
    yield metrics.outlier_ratio(SUBNORMAL).tobytes()


def require_same(change: Callable[[], Any]) -> None:
    expected = list(everything())

    def changed() -> tuple[bool, list[bytes], bool]:
        change()
        return is_default_environment(), list(everything()), is_default_environment()

    before, results, after = in_thread(changed)
    assert (before, after) == (False, False)  # it was changed, and is as it was
    assert [a == b for a, b in zip(results, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("change", CHANGES)
def test_results_are_those_of_a_clean_thread(change: str) -> None:
    require_same(CHANGES[change])


def test_after_a_session_that_flushes() -> None:
    run_python("require_same(flush_by_onnxruntime)")


def test_rounding_is_restored_exactly() -> None:
    def changed() -> tuple[int, int]:
        LIBM.fesetround(DOWNWARD)
        quantize(SUBNORMAL)
        return LIBM.fegetround(), DOWNWARD

    assert in_thread(changed) == (DOWNWARD, DOWNWARD)
    assert is_default_environment()


def test_what_cannot_be_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor whose environment we do not know."""
    monkeypatch.setattr(environment, "_standard", None)

    def changed() -> str:
        flush()
        with pytest.raises(RuntimeError) as caught:
            KVCache(2, 6, 8).append(SUBNORMAL, SUBNORMAL)
        return str(caught.value)

    message = in_thread(changed)
    assert message.startswith("KVCache.append: ")
    assert "set_denormal_as_zero" in message


def test_errors_leave_it_as_it_was() -> None:
    @in_default_environment
    def fail() -> None:
        assert is_default_environment()
        raise ZeroDivisionError

    def changed() -> int:
        LIBM.fesetround(UPWARD)
        with pytest.raises(ZeroDivisionError):
            fail()
        return int(LIBM.fegetround())

    assert in_thread(changed) == UPWARD


def test_threads_that_are_started_in_such_a_thread() -> None:
    """A thread begins with the environment of who starts it: the pool's, in a first big call."""
    run_python("""
numba.config.NUMBA_NUM_THREADS, kernels.SERIAL_ELEMENTS = 4, 0
x = np.concatenate([SUBNORMAL] * 4)
def changed():
    flush()
    return quantize(x, SMALL)
first = in_thread(changed)
assert threads._pool.cache_info().currsize == 1
expected = quantize(x, SMALL, "numpy")
for some in (first, quantize(x, SMALL)):
    assert some.packed.tobytes() == expected.packed.tobytes()
    assert some.scale.tobytes() == expected.scale.tobytes()
""")


def run_python(code: str) -> None:
    """Run in a process of its own, where nobody has made a session or a thread before."""
    code = (
        "import numba, numpy as np\nfrom nsq_ref.kernels import codec as kernels, threads\n"
        "from tests.nsq_ref.test_environment import *\n" + code
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_default_environment_in_itself() -> None:
    with default_environment("twice"), default_environment("twice"):
        assert is_default_environment()
    assert is_default_environment()
