"""The passages of an evaluation in several processes, of this machine or of a dask cluster."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from nsq_ref.extras import extra
from onnx_export.evaluation.core import Job, Worker
from onnx_export.evaluation.methods import Method
from onnx_export.evaluation.models import Opened
from onnx_export.evaluation.protocols import Record, Unit
from onnx_export.evaluation.store import Store

__all__ = ["spread"]

Todo = list[tuple[Unit, list[Method]]]
Found = list[tuple["Method | None", Record]]
Keep = Callable[[Unit, "Method | None", Record], None]

TRIES = 3  # of a passage whose worker is killed every time
TIMEOUT = 10  # seconds, until a scheduler answers

_opening = threading.Lock()


def spread(
    source: Opened,
    job: Job,
    todo: Sequence[tuple[Unit, list[Method]]],
    keep: Keep,
    *,
    folder: Path | None = None,
    workers: int = 1,
    scheduler: str | None = None,
) -> None:
    """Measure passages in other processes; those of a process that was killed are done again.

    Parameters
    ----------
    source : Opened
        How each process opens the model, once.
    job : Job
    todo : sequence
        Passages, and the methods of each.
    keep : callable
        Called with every figure as its passage is finished.
    folder : pathlib.Path, optional
        Where processes of this machine keep figures as they are finished.
    workers : int
        Processes of this machine.
    scheduler : str, optional
        Address of a dask scheduler, instead of them.

    Raises
    ------
    ChildProcessError
        If processes are killed again and again.
    OSError
        If there is no such scheduler.

    Examples
    --------
    >>> spread(Opened("model.gguf"), None, [], print)
    """
    if not todo:
        return
    if scheduler is not None:
        _on_cluster(scheduler, source, job, list(todo), keep)
    else:
        if source.threads is None:
            source = source._replace(threads=max(1, (os.cpu_count() or 1) // workers))
        _on_this_machine(workers, source, job, list(todo), keep, folder)


def _on_this_machine(
    workers: int, source: Opened, job: Job, todo: Todo, keep: Keep, folder: Path | None
) -> None:
    killed = 0
    while todo:
        left: Todo = []
        with _pool(min(workers, len(todo))) as pool:
            futures = {
                pool.submit(_measured, source, job, unit, methods, folder): (unit, methods)
                for unit, methods in todo
            }
            for future in as_completed(futures):
                unit, methods = futures[future]
                try:
                    found = future.result()
                except BrokenProcessPool:
                    left.append((unit, methods))
                else:
                    for method, record in found:
                        keep(unit, method, record)
        killed = killed + 1 if len(left) == len(todo) else 0
        if killed == TRIES:
            raise ChildProcessError(
                f"worker processes were killed {TRIES} times before a passage was finished (is "
                "there memory enough for so many?); what was finished is kept"
            )
        todo = [one for one in todo if one in left]


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Return new processes, which end with whatever ends the block."""
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # ONNX Runtime does not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    pool.shutdown()


def _on_cluster(scheduler: str, source: Opened, job: Job, todo: Todo, keep: Keep) -> None:
    with extra("scheduler", "a scheduler"):
        import distributed  # noqa: PLC0415
    _require_scheduler(scheduler)
    with distributed.Client(scheduler, timeout=TIMEOUT, set_as_default=False) as client:
        futures: dict[Any, Unit] = {
            client.submit(_measured, source, job, unit, methods, pure=False): unit
            for unit, methods in todo
        }
        for future in distributed.as_completed(futures, loop=client.loop):
            try:
                found = future.result()
            except distributed.KilledWorker as error:
                raise ChildProcessError(
                    f"workers of {scheduler} were killed again and again at a passage (is there "
                    "memory enough?); what was finished is kept"
                ) from error
            for method, record in found:
                keep(futures[future], method, record)


def _require_scheduler(address: str) -> None:
    """Refuse an address at which nobody answers, or who is no scheduler.

    A client that is refused says so a second time, and much later, as it is forgotten.
    """
    from distributed import comm  # noqa: PLC0415

    async def asked() -> Any:
        opened = await comm.connect(address, timeout=TIMEOUT)  # which says why it gave up
        try:
            await opened.write({"op": "identity", "reply": True})
            return await asyncio.wait_for(opened.read(), TIMEOUT)
        finally:
            opened.abort()

    try:
        answer = asyncio.run(asked())
    except (OSError, ValueError, MemoryError, asyncio.TimeoutError) as error:
        why = " ".join(str(error).split()) or f"no answer within {TIMEOUT} seconds"
        raise ConnectionError(f"no dask scheduler answers at {address!r}: {why}") from error
    if not isinstance(answer, dict) or answer.get("type") != "Scheduler":
        raise ConnectionError(f"what answers at {address!r} is no dask scheduler")


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is for who started it


def _measured(
    source: Opened, job: Job, unit: Unit, methods: list[Method], folder: Path | None = None
) -> Found:
    """Measure a passage; in the process that was asked."""
    with _opening:
        worker = _worker(source, job)
    store, found = Store(folder), Found()
    for method, record in worker.measured(unit, methods):
        found.append((method, record))
        if folder is not None and "refused" not in record:
            store.put(job.task(unit, method), record)
    return found


_last: list[tuple[Opened, Job, Worker]] = []


def _worker(source: Opened, job: Job) -> Worker:
    """Return the model at work, which stays open for the next passage of the same job."""
    for known_source, known_job, worker in _last:
        if known_source == source and known_job.same(job):
            return worker
    _last[:] = [(source, job, Worker(source.open(), job))]
    return _last[0][2]
