"""Several processes: the same figures, also where one is killed."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import distributed
import numpy as np
import pytest

from nsq_ref.policy import Policy, Sides
from onnx_export.evaluation import Evaluation, Method, Opened, Prefill, evaluate, workers
from onnx_export.models.tiny import tiny_gguf
from tests.support.evaluated import Killing

TEXT = np.random.default_rng(0).integers(0, 260, (3, 60))
PROTOCOL = Prefill(40, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("workers")
    return Opened(str(tiny_gguf(folder)), None, str(folder))


def methods(files: Path) -> list[Method]:
    killing = Killing(str(files))
    return [
        Method.of("naive4"),
        Method("killing", Policy(Sides(killing, killing), {})),
        Method.of("q4_0"),
    ]


@pytest.fixture(scope="module")
def expected(source: Opened, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """What one process finds, where nothing is killed."""
    files = tmp_path_factory.mktemp("nothing")
    found = evaluate(source, TEXT, methods(files), protocol=PROTOCOL)
    assert list(found.refused) == ["q4_0"]
    return found


@pytest.fixture
def scheduler() -> Iterator[str]:
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=None, memory_limit=0
    ) as cluster:
        yield cluster.scheduler_address


def same(found: Evaluation, expected: Evaluation) -> bool:
    """Whether all figures are the same bits."""
    return (found.records, found.baseline, found.refused) == (
        expected.records, expected.baseline, expected.refused,
    )  # fmt: skip


def test_a_killed_process_is_replaced(source: Opened, expected: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "kill").touch()
    names = methods(tmp_path)
    found = evaluate(source, TEXT, names, protocol=PROTOCOL, workers=2, store=tmp_path / "kept")
    assert not (tmp_path / "kill").exists()
    assert same(found, expected)


def test_processes_that_are_killed_every_time(source: Opened, tmp_path: Path) -> None:
    (tmp_path / "kill").touch()
    killing = Killing(str(tmp_path), once=False)
    names = [Method("killing", Policy(Sides(killing, killing), {}))]
    with pytest.raises(ChildProcessError, match="killed 3 times before a passage was finished"):
        evaluate(source, TEXT[:1], names, protocol=PROTOCOL, workers=2)


def test_a_killed_worker_of_a_cluster_is_replaced(
    source: Opened, expected: Evaluation, scheduler: str, tmp_path: Path
) -> None:
    (tmp_path / "kill").touch()
    found = evaluate(source, TEXT, methods(tmp_path), protocol=PROTOCOL, scheduler=scheduler)
    assert not (tmp_path / "kill").exists()
    assert same(found, expected)


def test_there_is_no_such_scheduler(source: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, though dask says it twice; and where somebody answers who is none, too."""
    monkeypatch.setattr(workers, "TIMEOUT", 1)
    for address, why in (("tcp://127.0.0.1:1", "refused|connect"), ("nowhere", "missing port")):
        with pytest.raises(ConnectionError, match=rf"scheduler answers at '{address}'.*({why})"):
            evaluate(source, TEXT, ["naive4"], protocol=PROTOCOL, scheduler=address)
    talks = "HTTP/1.0 400 Bad request\r\n" * 9
    with socketserver.TCPServer(("127.0.0.1", 0), _Says.with_words(talks)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ConnectionError, match=r"no dask scheduler answers at"):
            evaluate(source, TEXT, ["naive4"], protocol=PROTOCOL, scheduler=address)
        server.shutdown()


class _Says(socketserver.BaseRequestHandler):
    """Says something to whoever comes."""

    words = b""

    @classmethod
    def with_words(cls, words: str) -> type[_Says]:
        return type("_Says", (cls,), {"words": words.encode()})

    def handle(self) -> None:
        self.request.sendall(self.words)
