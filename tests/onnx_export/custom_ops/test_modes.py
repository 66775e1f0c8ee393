"""Native operators give the same bytes whatever floating-point mode a thread is in."""

from __future__ import annotations

import ctypes
import platform
import threading

import numpy as np
import pytest

from nsq_ref import Scheme
from tests.support.native_calls import Array, Session, codec_model, digests
from tests.support.onnx_attention import Config, Inputs, make_inputs, model

FLUSHING = {"set_denormal_as_zero": "1"}
UPWARD = {"aarch64": 0x400000, "arm64": 0x400000}.get(platform.machine(), 0x800)


@pytest.fixture(scope="module")
def plain() -> list[str]:
    """Digests of all calls in a session that flushes nothing."""
    return digests(tiny=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_sessions_that_flush_subnormals(threads: int, plain: list[str]) -> None:
    """N1 S3 Q1 M3 D1 A3. Codes, what is decoded, and attention; workers of the session too."""
    assert len(plain) > 100
    assert digests(tiny=True, threads=threads, config=FLUSHING) == plain


def test_threads_that_round_upwards() -> None:
    """N1 S3 Q1 D1 A3. The thread is as it was afterwards."""
    scheme = Scheme(block_size=4, symmetric=False)
    config = Config(head_dim=24, key=scheme, value=scheme, new_lengths=False)
    rng = np.random.default_rng(0)
    x = make_inputs(config, rng, np.zeros(1, np.int64), 13)
    x |= {f"past_{name}": np.zeros(*field) for name, field in config.cache(1).items()}
    x |= {"x": x["query"], "past_lengths": np.zeros(1, np.int64)}
    sessions = [Session(codec_model("Quantize", scheme)), Session(model(config, functions=[]))]
    c = ctypes.CDLL(None)
    found: list[dict[str, Array]] = []
    modes = []

    def run(mode: int) -> None:
        c.fesetround(mode)
        results: Inputs = {}
        for session in sessions:
            results |= session.run(x)
        modes.append(c.fegetround())
        found.append(results)

    for mode in (0, UPWARD):  # 0 is to nearest
        thread = threading.Thread(target=run, args=[mode])
        thread.start()
        thread.join()
    assert modes == [0, UPWARD]
    for name, one in found[0].items():
        assert one.tobytes() == found[1][name].tobytes(), name
