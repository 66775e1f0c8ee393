"""Sessions beside `KVCache`: the same bytes and the same refusals, in whatever order."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsq_ref import KVCache
from onnx_export.running import Model, Session
from tests.support import lookup_decoder
from tests.support.lookup_decoder import HEAD_DIM, KEY, KV_HEADS, LAYERS, POISONS, VALUE, VALUE_DIM

CAPACITY = 24
TABLES = lookup_decoder.Tables()
FEEDBACK = {1: lookup_decoder.some_feedback()}  # layer 0 has none
BEHIND = 0x5A


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("lookup")
    return Model(lookup_decoder.quantized(folder, feedback=FEEDBACK), threads=1)


class Expected:
    """What a session's cache must hold: a `KVCache` a layer."""

    def __init__(self, caches: list[KVCache]) -> None:
        self.caches = caches

    @classmethod
    def empty(cls, batch: int) -> Expected:
        return cls(
            [KVCache(batch, KV_HEADS, HEAD_DIM, KEY, VALUE, value_head_dim=VALUE_DIM,
                     key_feedback=FEEDBACK.get(layer))
             for layer in range(LAYERS)]
        )  # fmt: skip

    def append(self, rows: Sequence[Sequence[int]]) -> bool:
        """Append to all layers or none; tell whether that went."""
        width = max(map(len, rows))
        padded = np.array([[*row, *[0] * (width - len(row))] for row in rows])
        after = [cache.fork() for cache in self.caches]
        for layer, cache in enumerate(after):
            pairs = [TABLES.cached(layer, row) for row in padded]
            keys, values = (np.stack(side) for side in zip(*pairs, strict=True))
            try:
                cache.append(keys, values, [len(row) for row in rows])
            except ValueError:
                return False
        self.caches = after
        return True

    @property
    def lengths(self) -> list[int]:
        return self.caches[0].lengths.tolist()


def require_equal(session: Session, expected: Expected) -> None:
    assert list(session.lengths) == expected.lengths
    found = session.tensors()
    for layer, cache in enumerate(expected.caches):
        for row in range(cache.batch):
            stored = cache.stored(row)
            for side, tokens in (("key", stored.keys), ("value", stored.values)):
                for part, array in tokens.arrays.items():
                    if part == "collapsed":
                        continue
                    ours = found[f"past_key_values.{layer}.{side}.{part}"][row]
                    assert ours[:, : array.shape[1]].tobytes() == array.tobytes(), (side, part)


def tokens(count: int) -> st.SearchStrategy[list[int]]:
    """Such as blocks can hold."""
    return st.lists(st.integers(0, min(POISONS) - 1), min_size=1, max_size=count)


OPERATIONS = st.one_of(
    st.tuples(st.just("read"), st.lists(tokens(9), min_size=3, max_size=3)),
    st.tuples(st.just("read"), st.lists(tokens(1), min_size=3, max_size=3)),
    st.tuples(st.just("poison"), st.lists(tokens(9), min_size=3, max_size=3)),
    st.tuples(st.just("crop"), st.lists(st.integers(0, 30), min_size=3, max_size=3)),
    st.tuples(st.just("fork"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
    st.tuples(st.just("restore"), st.none()),
)


@given(batch=st.integers(1, 3), operations=st.lists(OPERATIONS, max_size=7))
def test_the_bytes_are_those_of_kv_cache(
    model: Model, batch: int, operations: list[tuple[str, Any]]
) -> None:
    """Rules K1, B1, B2, C1 and F1, through every operation of a session."""
    require_same(model, batch, operations)


def require_same(model: Model, batch: int, operations: Sequence[tuple[str, Any]]) -> None:
    """Do the same to a session and to what it must hold, and compare after each."""
    session, expected = Session(model, capacity=CAPACITY, batch=batch), Expected.empty(batch)
    for operation, argument in operations:
        if operation in ("read", "poison"):
            rows = [list(row) for row in argument[: session.batch]]
            if operation == "poison":
                rows[0][-1] = POISONS[len(rows[0]) % 2]
            lengths = [n + len(row) for n, row in zip(expected.lengths, rows, strict=True)]
            if max(lengths) <= CAPACITY and expected.append(rows):
                session.forward(rows, num_logits=1)
            else:
                with pytest.raises(ValueError, match=r"capacity is 24|refuses these tokens"):
                    session.forward(rows, num_logits=1)
        elif operation == "crop":
            kept = [min(n, k) for n, k in zip(expected.lengths, argument, strict=False)]
            session.crop(kept)
            for cache in expected.caches:
                cache.crop(kept)
        elif operation == "fork":
            rows = [row % session.batch for row in argument]
            session = session.fork(rows)
            expected = Expected([cache.fork(rows) for cache in expected.caches])
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "state.safetensors")
                session.save(path)
                session = Session(model, capacity=CAPACITY, batch=session.batch)
                session.restore(path)
        require_equal(session, expected)


def test_the_functions_give_the_same(model: Model) -> None:
    """Without the library, where past and present are two memories."""
    operations: list[tuple[str, Any]] = [
        ("read", [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [12]]),
        ("read", [[1], [2]]),
        ("restore", None),
        ("crop", [6, 2]),
        ("read", [[7, 8], [9, 10, 11, 12, 13, 14, 15]]),
        ("fork", [1, 0, 1]),
        ("read", [[16], [17], [18]]),
    ]
    require_same(Model(model.path, threads=1, library=False), 2, operations)


@pytest.mark.parametrize("poison", POISONS)
def test_a_refused_step_leaves_the_tail_that_it_would_have_overwritten(
    model: Model, poison: int
) -> None:
    """One layer has sealed its block, and begun the next tail, when the other refuses."""
    session, expected = Session(model, capacity=CAPACITY), Expected.empty(1)
    for rows in ([[1, 2, 3, 4]], [[5, 6]]):
        session.forward(rows)
        assert expected.append(rows)
    refused = [[7, 8, 9, poison, 10, 11, 12, 13]]
    with pytest.raises(ValueError, match=r"the model refuses these tokens: .*float16"):
        session.forward(refused)
    assert not expected.append(refused)
    require_equal(session, expected)
    session.forward([7, 8, 9, 10])
    assert expected.append([[7, 8, 9, 10]])
    require_equal(session, expected)


def test_an_exception_between_run_and_result_changes_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C may come when the model has run, and the session does not yet know."""
    session, expected = Session(model, capacity=CAPACITY), Expected.empty(1)
    session.forward([1, 2, 3, 4, 5, 6])
    assert expected.append([[1, 2, 3, 4, 5, 6]])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime.IOBinding.get_outputs_as_ortvaluevector", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.forward([7, 8, 9, 10, 11])
    require_equal(session, expected)
    session.forward([7, 8, 9, 10, 11])
    assert expected.append([[7, 8, 9, 10, 11]])
    require_equal(session, expected)


def test_a_step_is_in_place(tmp_path: Path) -> None:
    """The same memory at every step, and what lies behind the tokens is left alone."""
    session = Session(lookup_decoder.quantized(tmp_path), capacity=CAPACITY)
    places = {name: array.ctypes.data for name, array in session.tensors().items()}
    packed = session.tensors()["past_key_values.0.key.packed"]
    packed[:, :, 20:] = BEHIND  # where no block of this text will be sealed
    for token in range(16):
        session.forward([token])
    assert {name: array.ctypes.data for name, array in session.tensors().items()} == places
    assert (packed[:, :, 20:] == BEHIND).all()
    assert packed[:, :, :12].any()


def test_memory_is_what_is_stored(model: Model) -> None:
    session, expected = Session(model, capacity=CAPACITY, batch=2), Expected.empty(2)
    rows = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5, 6]]
    session.forward(rows)
    assert expected.append(rows)
    memory, arrays = session.memory(), session.tensors()
    used = sum(
        array.nbytes
        for cache in expected.caches
        for row in range(2)
        for side in cache.stored(row)
        for name, array in side.arrays.items()
        if name != "collapsed"
    )
    assert memory.used == used
    assert memory.nbytes == sum(array.nbytes for array in arrays.values())
    assert memory.parts["tail"] == sum(a.nbytes for n, a in arrays.items() if n.endswith(".tail"))
    assert memory.float16 == 2 * 13 * LAYERS * KV_HEADS * (HEAD_DIM + VALUE_DIM)
    assert all(array.ctypes.data % 64 == 0 for array in arrays.values())
