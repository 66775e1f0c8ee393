"""Work in equal shares on a few threads, or on none where there are none to be had."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nsq_ref.environment import in_default_environment


def in_shares(work: Callable[..., None], tasks: int, threads: int, *arguments: Any) -> None:
    """Call ``work(first, last, *arguments)`` for all of [0, ``tasks``), on at most ``threads``.

    Every thread gets an equal share.

    The caller does what no other thread has begun. So it waits for nobody who is busy elsewhere,
    and does everything where no thread can be started: when the interpreter is shutting down, or
    where a container allows no more.

    Examples
    --------
    >>> done = []
    >>> in_shares(lambda first, last: done.extend(range(first, last)), 10, 3)
    >>> sorted(done) == list(range(10))
    True
    """
    threads = min(tasks, threads)
    if threads <= 1:
        work(0, tasks, *arguments)
        return
    edges = [tasks * i // threads for i in range(threads + 1)]
    # The arguments go with the shares: a pool that cannot start its threads may keep `take`.
    shares = deque((edges[i], edges[i + 1], *arguments) for i in range(threads))

    @in_default_environment
    def take() -> None:
        while True:
            try:
                share = shares.popleft()
            except IndexError:
                return
            work(*share)

    helpers: list[Future[None]] = []
    try:
        for _ in range(threads - 1):
            helpers.append(_pool(threads - 1).submit(take))
    except RuntimeError:
        pass  # no thread can be started
    try:
        take()
    finally:
        shares.clear()  # after an error the others need not go on
        for helper in helpers:
            if not helper.cancel():
                helper.exception()  # waits
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="nsq")


if hasattr(os, "register_at_fork"):
    # A fork has the memory of its parent, but not its threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)
