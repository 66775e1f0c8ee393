"""Work in shares: all of it is done, once, whoever can or cannot help."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nsq_ref.kernels.threads import in_shares

BIG = """
import os, sys, threading, atexit
import numpy as np, numba
import nsq_ref as nsq
numba.config.NUMBA_NUM_THREADS = 3
x = np.random.default_rng(0).standard_normal((6, 512, 64), dtype=np.float32)
cache = nsq.KVCache(batch=1, kv_heads=6, head_dim=64)
cache.append(x[None], x[None])
query = np.ones((1, 48, 48, 64), np.float32)
expected = nsq.quantize(x, backend="numpy").packed.tobytes()
def work(say=print):
    q = nsq.quantize(x)
    assert q.packed.tobytes() == expected
    nsq.dequantize(q)
    cache.attend(query)
    say("done", flush=True)
"""
NO_ROOM = """
import resource, threading
resource.setrlimit(resource.RLIMIT_AS, (1 << 34, resource.RLIM_INFINITY))
threading.stack_size(1 << 35)
"""
FROM_MANY_PLACES = {
    "atexit": "atexit.register(work)",
    "atexit, after a call": "atexit.register(work); work()",
    "a thread that outlives the main one": """
def late():
    threading.main_thread().join()
    work()
threading.Thread(target=late).start()
""",
    "a thread that outlives it, after a call": """
def late():
    threading.main_thread().join()
    work()
work()
threading.Thread(target=late).start()
""",
    "a child of a process that has threads": """
work()
child = os.fork()
if child == 0:
    work()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
    "a grandchild, and its parents after it": """
work()
for _ in range(2):
    child = os.fork()
    if child == 0:
        work()
        if _ == 1:
            os._exit(0)
    else:
        assert os.waitpid(child, 0)[1] == 0
        work()
        os._exit(0)
""",
    "multiprocessing's forks": """
import multiprocessing
work()
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.map(quantized := nsq.quantize, [x, x, x])
work()
""",
    "no room for another thread": """
work()
try:
    threading.Thread(target=work).start()
except RuntimeError:
    print("as meant")
""",
}


@pytest.mark.parametrize("place", FROM_MANY_PLACES)
def test_from_everywhere(place: str) -> None:
    code = FROM_MANY_PLACES[place]
    if "fork" in code and not hasattr(os, "fork"):
        return
    done = subprocess.run(
        [sys.executable, "-c", (NO_ROOM if "no room" in place else "") + BIG + code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ("as meant" if "no room" in place else "done") in done.stdout, done.stderr
    assert (done.returncode, done.stderr) == (0, "")


@given(st.integers(1, 200), st.integers(1, 9))
def test_every_task_is_done_once(tasks: int, threads: int) -> None:
    done: list[int] = []
    in_shares(lambda first, last: done.extend(range(first, last)), tasks, threads)
    assert sorted(done) == list(range(tasks))


@given(st.integers(2, 40), st.integers(2, 9), st.data())
def test_an_error_is_raised_when_no_share_is_under_way(
    tasks: int, threads: int, data: st.DataObject
) -> None:
    bad = data.draw(st.integers(0, tasks - 1))
    running: set[int] = set()

    def work(first: int, last: int) -> None:
        running.add(first)
        try:
            if bad in range(first, last):
                raise KeyError(bad)
        finally:
            running.remove(first)

    with pytest.raises(KeyError, match=str(bad)):
        in_shares(work, tasks, threads)
    assert not running


def test_shares_within_shares_wait_for_nobody() -> None:
    """All threads of the pool are busy with what makes new shares."""
    done: list[int] = []

    def inner(first: int, last: int) -> None:
        done.extend(range(first, last))

    def outer(first: int, last: int) -> None:
        for _ in range(first, last):
            in_shares(inner, 3, 3)

    in_shares(outer, 30, 3)
    assert sorted(done) == sorted([0, 1, 2] * 30)


def test_callers_in_many_threads() -> None:
    done: list[int] = []

    def call() -> None:
        for _ in range(50):
            in_shares(lambda first, last: done.extend(range(first, last)), 7, 3)

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(done) == sorted([*range(7)] * 300)
