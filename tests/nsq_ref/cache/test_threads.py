"""KVCache and its forks in threads, interrupted at any place, copied and pickled.

Threads take turns between any two instructions. Instead of hoping for the wrong moment, most tests
here make it: another step is taken within the first one, at each of its instructions in turn.
"""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import pickle
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nsq_ref import KVCache, RangeError, Scheme, attention, cache, quantize
from nsq_ref.cache.pages import Cell, Change
from nsq_ref.cache.sequence import Sequence, Side
from nsq_ref.codec import block_of
from tests.support.cache_model import bits, everything, normals

Array = npt.NDArray[Any]

SCHEME = Scheme(block_size=4, sink_tokens=1)
FILES = {str(path) for path in Path(cache.__file__).parent.glob("*.py")}
# Where memory is claimed every instruction counts; elsewhere a line may be taken as one.
CLAIMING = {Cell.swap.__code__, Cell._last.__code__, Change.claim.__code__}
PROMPT, ONE, OTHER = (normals(2, 1, 1, tokens, 2, seed=tokens) for tokens in (8, 7, 9))


def cache_of(*chunks: Array) -> KVCache:
    made = KVCache(1, 1, 2, SCHEME, SCHEME)
    for keys, values in chunks:
        made.append(keys, values)
    return made


def at_instruction(number: int, step: Callable[[], object], other: Callable[[], object]) -> bool:
    """Take a step, and another one before its instruction of this number, if it has so many."""
    left = number

    def within(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if event in ("line", "opcode"):
            if left == 0:
                other()
            left -= 1
        return within

    def called(frame: FrameType, *_: object) -> Any:
        frame.f_trace_opcodes = frame.f_code in CLAIMING
        return within if frame.f_code.co_filename in FILES else None

    tracing = sys.gettrace()
    sys.settrace(called)
    try:
        step()
    finally:
        sys.settrace(tracing)
    return left < 0


# --- forks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True])
def test_forks_at_every_instruction_of_each_other(refused: bool) -> None:
    """Each goes on on its own, be the other's append refused or not."""
    wrong = ONE.copy()
    wrong[1, 0, 0, 1] = 1e9  # of values, when keys have been coded
    expected = [bits(cache_of(PROMPT, x)) for x in (ONE, OTHER)]
    for number in itertools.count():
        prompt = cache_of(PROMPT)
        one, other, later = prompt.fork(), prompt.fork(), prompt.fork()

        def step(fork: KVCache = one) -> None:
            if refused:
                with pytest.raises(RangeError):
                    fork.append(*wrong)
            else:
                fork.append(*ONE)

        reached = at_instruction(number, step, lambda fork=other: fork.append(*OTHER))  # type: ignore[misc]
        if refused:
            assert bits(one) == bits(prompt)
            one.append(*ONE)
        later.append(*ONE)
        if not reached:
            break
        assert [bits(one), bits(other), bits(later)] == [*expected, expected[0]], number
    assert number > 200


def test_two_growths_before_either_is_written() -> None:
    """The memory is whose who asked first; the other one's growth lies elsewhere."""
    side = Side(SCHEME, 1, 2)
    with Change() as change:
        prompt = Sequence.empty(side).grown(PROMPT[0, 0], change)
        change.write()
    with Change() as change, Change() as another:
        one = prompt.grown(ONE[0, 0], change)
        other = prompt.grown(OTHER[0, 0], another)
        another.write()
        change.write()
    assert one.pages[0] is prompt.pages[0] is not other.pages[0]
    for grown, x in ((one, ONE), (other, OTHER)):
        out = np.zeros((1, grown.length, 2), np.float32)
        grown.dequantize(out)
        assert out.tobytes() == cache_of(PROMPT, x).dequantize()[0].tobytes()


def test_forks_that_share_room_in_a_tail() -> None:
    """Of those who go on in the same tail, one writes there."""
    x = normals(3, 2, 1, 1, 2, 2, seed=3)
    prompt = KVCache(1, 1, 2, Scheme(block_size=8), Scheme(block_size=8))
    for t in range(5):  # one by one, so that there is room for eight
        prompt.append(*ONE[:, :, :, t : t + 1])
    forks = [prompt, prompt.fork(), prompt.fork()]
    for fork, own in zip(forks, x, strict=True):
        fork.append(*own)
    for fork, own in zip(forks, x, strict=True):
        expected = np.concatenate([ONE[0, 0, :, :5], own[0, 0]], axis=1)
        assert fork.stored().keys.tail.tobytes() == expected.tobytes()


@pytest.fixture
def _busy_switching() -> Any:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def in_threads(*steps: Callable[[], object]) -> None:
    """Take all steps at once."""
    together = threading.Barrier(len(steps))
    threads = [threading.Thread(target=lambda s=s: (together.wait(), s())) for s in steps]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("_busy_switching")
def test_forks_in_threads() -> None:
    """As in use: no tokens of another fork, in 200 of them."""
    x = normals(4, 2, 1, 1, 11, 2, seed=4)
    expected = [bits(cache_of(PROMPT, own)) for own in x]
    query = normals(1, 1, 1, 2)

    def go_on(fork: KVCache, own: Array) -> None:
        for start in range(0, 11, 5):
            fork.append(*own[:, :, :, start : start + 5])
            fork.attend(query)

    for _ in range(50):
        prompt = cache_of(PROMPT)
        forks = [prompt.fork() for _ in x]
        in_threads(*(lambda f=f, own=own: go_on(f, own) for f, own in zip(forks, x, strict=True)))  # type: ignore[misc]
        assert [bits(fork) for fork in forks] == expected


# --- one cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.append(*OTHER),
        lambda c: c.crop(3),
        lambda c: c.reorder([0, 0]),
    ],
)
@pytest.mark.parametrize(
    "step",
    [
        lambda c: c.append(*ONE),
        lambda c: c.crop(6),
        lambda c: c.reorder([0]),
    ],
)
def test_one_cache_changed_at_every_instruction_of_a_change(
    step: Callable[[KVCache], None], change: Callable[[KVCache], None]
) -> None:
    """One after the other, or the one that the other overtook is refused; nothing in between."""
    alone, both = [], []
    for first, second in ((step, change), (change, step)):
        one = cache_of(PROMPT)
        first(one)
        alone.append(bits(one))
        try:
            second(one)
        except ValueError:  # what is left is too little
            continue
        both.append(bits(one))
    refused_with: set[str] = set()
    for number in itertools.count():
        one = cache_of(PROMPT)
        failed: list[Exception] = []

        def outcome(of: Callable[[KVCache], None], c: KVCache = one, to: Any = failed) -> None:
            try:
                of(c)
            except (RuntimeError, ValueError):
                to.append(sys.exc_info()[1])

        reached = at_instruction(number, lambda o=outcome: o(step), lambda o=outcome: o(change))  # type: ignore[misc]
        refused_with |= {str(error) for error in failed if isinstance(error, RuntimeError)}
        if not reached:
            break
        assert bits(one) in (alone if failed else both), number
        assert len(failed) < 2
    (message,) = refused_with
    assert message.startswith("another thread changed this cache at the same time")


@pytest.mark.parametrize(
    "read",
    [
        bits,
        lambda c: [x.tobytes() for x in c.dequantize()],
        lambda c: c.attend(normals(1, 1, 1, 2)).tobytes(),
        lambda c: bits(pickle.loads(pickle.dumps(c))),
        lambda c: bits(c.fork()),
        repr,
        lambda c: c.bits_per_element,
    ],
)
def test_a_cache_is_read_as_it_was_at_one_moment(read: Callable[[KVCache], Any]) -> None:
    """Appended to within reading, and read within appending: before or after, nothing else."""
    expected = [read(cache_of(PROMPT)), read(cache_of(PROMPT, ONE))]
    seen: list[Any] = []
    for number in itertools.count(step=3):
        one, other = cache_of(PROMPT), cache_of(PROMPT)
        took = [
            at_instruction(number, lambda c=one: seen.append(read(c)), lambda c=one: c.append(*ONE)),  # type: ignore[misc]
            at_instruction(number, lambda c=other: c.append(*ONE), lambda c=other: seen.append(read(c))),  # type: ignore[misc]
        ]  # fmt: skip
        assert all(result in expected for result in seen[-2:]), number
        if not any(took):
            break


def test_a_cache_is_saved_as_it_was_at_one_moment(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    expected = [bits(cache_of(PROMPT)), bits(cache_of(PROMPT, ONE))]
    number, reached = 0, True
    while reached:
        one = cache_of(PROMPT)
        reached = at_instruction(number, lambda c=one: c.save(path), lambda c=one: c.append(*ONE))  # type: ignore[misc]
        assert bits(KVCache.load(path)) in expected
        number += 20


def test_an_interruption_at_any_instruction_leaves_before_or_after() -> None:
    """Ctrl-C, no memory: an append is whole or was never made, and all goes on."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    before, after = bits(cache_of(PROMPT)), bits(cache_of(PROMPT, ONE))
    seen = set()
    for number in itertools.count():
        one = cache_of(PROMPT)
        fork = one.fork()
        try:
            at_instruction(number, lambda c=one: c.append(*ONE), interrupt)  # type: ignore[misc]
        except KeyboardInterrupt:
            made = bits(one) == after
            seen.add(made)
            assert made or bits(one) == before
            if not made:
                one.append(*ONE)
            fork.append(*OTHER)
            assert bits(one) == after
            assert bits(fork) == bits(cache_of(PROMPT, OTHER))
        else:
            break
    assert seen == {False, True}


@pytest.mark.usefixtures("_busy_switching")
def test_one_cache_in_threads() -> None:
    """What an append of several threads is refused with is a RuntimeError, and no token is lost."""
    for _ in range(25):
        one = cache_of()
        x = normals(4, 2, 1, 1, 3, 2, seed=5)
        done: list[int] = []

        def append(i: int, c: KVCache = one, x: Array = x, done: list[int] = done) -> None:
            for _ in range(3):
                try:
                    c.append(*x[i])
                except RuntimeError:
                    continue
                done.append(i)

        in_threads(*(lambda i=i: append(i) for i in range(4)))  # type: ignore[misc]
        assert len(one) == 3 * len(done) > 0
        stored = one.stored().keys.sinks[0, 0].tobytes()
        assert stored in {own[0, 0, 0, 0].tobytes() for own in x}


# --- copies -------------------------------------------------------------------------------------


def test_a_pickle_has_nothing_of_other_forks() -> None:
    """Memory behind a cache's own tokens is another's, or has never been written."""
    prompt = cache_of(PROMPT)
    other = prompt.fork()
    other.append(*ONE)
    tail = np.ascontiguousarray(other.stored().values.tail).tobytes()
    packed = other.stored().keys.sealed
    assert packed is not None
    written = np.ascontiguousarray(packed.norm[:, 4:]).tobytes() if packed.norm is not None else b""
    pickled = pickle.dumps(prompt)
    assert tail in pickle.dumps(other)
    assert written in pickle.dumps(other)
    assert tail not in pickled
    assert written not in pickled


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_copies_go_on_on_their_own(copied: Callable[[KVCache], KVCache]) -> None:
    """And read their own memory, when what they were made of is gone."""
    original = cache_of(PROMPT)
    query = normals(1, 1, 1, 2)
    expected = original.attend(query).tobytes()
    other = copied(original)
    original.append(*ONE)
    assert bits(other) == bits(cache_of(PROMPT))
    del original
    gc.collect()
    filler = [np.full(n, 255, np.uint8) for n in (64, 256, 1024, 4096) for _ in range(50)]
    assert other.attend(query).tobytes() == expected
    other.append(*OTHER)
    assert bits(other) == bits(cache_of(PROMPT, OTHER))
    assert len(filler) == 200


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copied_piece_is_read_where_it_lies(copied: Callable[[Any], Any]) -> None:
    piece = attention.prepare(block_of(quantize(normals(2, 6, 8))), Scheme(), 8)
    other = copied(piece)
    addresses = {array.ctypes.data for array in other.arrays if array.size}
    assert not addresses & {array.ctypes.data for array in piece.arrays if array.size}
    query = normals(2, 1, 8)
    one, two = (
        attention.attend_quantized(query, [p], [p], Scheme(), Scheme())[0] for p in (piece, other)
    )
    assert one.tobytes() == two.tobytes()


def test_results_are_the_callers() -> None:
    """Whoever writes to what a cache returned, or was given, changes nothing in it."""
    x = PROMPT.copy()
    one = cache_of(x)
    before = everything(one)
    x[...] = -1
    for row in (one.stored().keys, one.stored().values):
        for array in row.arrays.values():
            array[...] = 0
    query = normals(1, 1, 1, 2)
    for array in (*one.dequantize(), one.lengths, *one.attend(query, return_weights=True)):
        array[...] = 0
    assert everything(one) == before


def public_classes() -> list[type]:
    """Every class of ours in docs/api.md, errors and what needs torch aside."""
    api = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
    modules = map(
        importlib.import_module,
        re.findall(r"automodule:: ((?:nsq_ref|onnx_export)(?!\.transformers)[\w.]*)", api),
    )
    classes = {
        thing
        for module in modules
        for name, thing in vars(module).items()
        if name in getattr(module, "__all__", [name])
        and isinstance(thing, type)
        and thing.__module__.startswith(("nsq_ref", "onnx_export"))
        and not name.startswith("_")
        and not issubclass(thing, BaseException)
    }
    return sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))


@pytest.mark.parametrize(
    "cls", public_classes(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}"
)
def test_every_public_class_says_what_threads_may_do(cls: type) -> None:
    assert re.search(r"[Tt]hread", cls.__doc__ or "")
