"""Answers in a pipe: whatever comes twice, late, cut or not at all is named where it happens."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsq_ref import Scheme
from nsq_ref.conformance import ports
from nsq_ref.conformance.operations import DONE, Answer, Case, Failure
from nsq_ref.conformance.ports.frames import (
    FrameError,
    Frames,
    StreamEndedError,
    read_frame,
    scheme_array,
    scheme_of,
    write_frame,
)

CASE = Case("case/0", "encode", Scheme(), (), {"x": np.ones((1, 1), np.float32)})
CASES = 5


def answer(number: int) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, ports.reply_of(number, Answer(DONE, {"packed": np.uint8([number % 256])})))
    return stream.getvalue()


def frame(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, arrays)
    return stream.getvalue()


def header(name: bytes, kind: int, axes: int, *shape: int) -> bytes:
    return b"NSQ1" + struct.pack("<I32sII4I", 1, name, kind, axes, *shape)


# What is no frame, or a frame that answers nothing; none of them swallows what follows.
JUNK = {
    "text": b"norm = 3.5\n",
    "half a mark": b"NSQ",
    "a mark": b"NSQ1" + b"\xff" * 4,
    "no case": frame(status=np.int32([0])),
    "a case of floats": frame(case=np.float32([1]), status=np.int32([0])),
    "two cases": frame(case=np.int32([1, 2]), status=np.int32([0])),
    "a negative case": frame(case=np.int32([-1]), status=np.int32([0])),
    "a case never asked": answer(CASES),
    "a far case": answer(2**31 - 1),
    "an unknown dtype": header(b"packed", 9, 1, 1, 1, 1, 1),
    "many axes": header(b"packed", 0, 9, 1, 1, 1, 1),
    "no name": header(b"", 0, 1, 0, 1, 1, 1),
    "much": header(b"packed", 0, 4, *[2**31] * 4),
    "no elements and no array": header(b"packed", 0, 4, 2**32 - 1, 2**32 - 1, 2**32 - 1, 0),
}


def asked(data: bytes, numbers: Sequence[int] = range(CASES), known: bool = True) -> list[Any]:
    port = ports.Stream("mine", io.BytesIO(data))
    port.cases = CASES if known else None
    return [port.ask(number, CASE) for number in numbers]


def right(numbers: Sequence[int] = range(CASES)) -> list[bytes]:
    return [answer(number) for number in numbers]


def wrong(results: Sequence[Any]) -> dict[int, Failure]:
    """The failures; everything else has to be the answer to its own case."""
    for number, result in enumerate(results):
        if not isinstance(result, Failure):
            assert result.arrays["packed"].tolist() == [number]
    return {n: one for n, one in enumerate(results) if isinstance(one, Failure)}


def expected(items: Sequence[int | str]) -> set[int]:
    """The cases that fail: those without an answer in turn, and those beside something odd."""
    last, failing, odd = -1, set(), False
    for item in [*items, CASES]:
        if item == CASES or (isinstance(item, int) and item > last):
            failing |= set(range(last + 1, int(item)))
            if odd:  # in place of the next answer, or behind the last one
                failing.add(last + 1 if item > last + 1 or last < 0 else last)
            last, odd = int(item), False
        else:
            odd = True
    return failing


@given(
    st.one_of(
        st.permutations(range(CASES)),
        st.lists(st.one_of(st.integers(0, CASES - 1), st.sampled_from(sorted(JUNK))), max_size=9),
    )
)
def test_only_the_cases_beside_an_oddity_fail(items: list[int | str]) -> None:
    """Every order of answers and of what is none, against a model of what each case gets."""
    data = b"".join(answer(one) if isinstance(one, int) else JUNK[one] for one in items)
    results = asked(data)
    assert set(wrong(results)) == expected(items)


@pytest.mark.parametrize("place", range(CASES + 1))
@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_answer_is_found_everywhere(place: int, junk: str) -> None:
    """Among right answers: exactly one case fails, the one whose answer comes before it."""
    parts = right()
    failures = wrong(asked(b"".join([*parts[:place], JUNK[junk], *parts[place:]])))
    assert list(failures) == [max(place - 1, 0)]
    assert {one.kind for one in failures.values()} == {"garbage"}


@pytest.mark.parametrize(
    ("data", "failing"),
    [
        ([0, 1, 1, 2, 3, 4], {1: "after case 1 came another answer to case 1"}),
        ([0, 1, 2, 1, 3, 4], {2: "after case 2 came another answer to case 1"}),
        ([0, 1, 2, 3, 4, 4], {4: "after case 4 came another answer to case 4"}),
        ([0, 1, 1, 3, 4], {2: "after case 1 came another answer to case 1"}),
        ([0, 1, 3, 4], {2: "after case 1 the stream goes on with case 3"}),
        ([0, 2, 1, 3, 4], {
            1: "after case 0 the stream goes on with case 2",
            2: "after case 2 came the answer to case 1, out of order",
        }),
        ([0, 1, 2, 7, 3, 4], {2: "after case 2 came an answer to case 7, which was not asked"}),
        ([0, 1, 2, 7, 4], {3: "after case 2 came an answer to case 7, which was not asked"}),
        ([7, 0, 1, 2, 3, 4], {0: "before any answer came an answer to case 7, which was not"}),
        ([0, 1, 2, 3], {4: "the stream ended after case 3"}),
        ([], dict.fromkeys(range(CASES), "the stream ended before any answer")),
        ([0] * 9, {
            1: "after case 0 came another answer to case 0; another answer to case 0; another "
               "answer to case 0; and 5 more",
            **dict.fromkeys(range(2, CASES), "the stream ended after case 0"),
        }),
    ],
)  # fmt: skip
def test_what_went_wrong_is_said(data: list[int], failing: dict[int, str]) -> None:
    failures = wrong(asked(b"".join(map(answer, data))))
    assert list(failures) == list(failing)
    for number, says in failing.items():
        assert says in failures[number].message


def test_a_cut_end_is_told_as_that() -> None:
    """Wherever it is cut, everything before it is judged."""
    whole, last = b"".join(right(range(CASES - 1))), answer(CASES - 1)
    for cut in range(1, len(last)):
        failures = wrong(asked(whole + last[:cut]))
        assert list(failures) == [CASES - 1]
        assert "after case 3 in the midst of an answer" in failures[CASES - 1].message or cut < 4
    behind = wrong(asked(b"".join(right()) + last[:-1]))
    assert list(behind) == [CASES - 1]
    assert "after case 4 came what is no frame" in behind[CASES - 1].message


def test_a_frame_that_announces_more_than_comes_swallows_nothing() -> None:
    """The answers that lie in what was announced are found."""
    parts = right()
    long = header(b"packed", 3, 1, 1 << 20, 1, 1, 1)
    failures = wrong(asked(b"".join([*parts[:2], long, *parts[3:]])))
    assert list(failures) == [2]


def test_some_cases_of_a_stream() -> None:
    """Answers to those that are left out are passed over, and so is what lies between them."""
    data = b"".join([answer(0), answer(0), b"text", answer(1), answer(2), answer(3), answer(4)])
    for known in (True, False):
        (one,) = asked(data, [2], known)
        assert one.arrays["packed"].tolist() == [2]
        two, four = asked(data, [1, 4], known)
        assert [two.arrays["packed"][0], four.arrays["packed"][0]] == [1, 4]


def test_text_without_end_is_given_up() -> None:
    """Somebody who writes anything but frames is not read for ever."""

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    port = ports.Stream("mine", io.BufferedReader(Endless()))
    port.cases = CASES
    results = [port.ask(number, CASE) for number in range(CASES)]
    assert [one.kind for one in results if isinstance(one, Failure)] == ["garbage"] + 4 * [
        "missing"
    ]


# --- frames -------------------------------------------------------------------------------------


@given(st.data())
def test_any_bytes_are_frames_or_a_frame_error(data: Any) -> None:
    """Broken frames raise `FrameError` and nothing else, whatever a byte is changed to."""
    good = bytearray(answer(3))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_frame(io.BytesIO(bytes(good)))
    except FrameError:
        return


@pytest.mark.parametrize("shape", [
    (2**32 - 1, 2**32 - 1, 2**32 - 1, 0), (2**32 - 1, 0, 2**32 - 1, 2**32 - 1),
])  # fmt: skip
def test_shapes_that_no_array_has(shape: tuple[int, ...]) -> None:
    with pytest.raises(FrameError, match="'packed' has the shape"):
        read_frame(io.BytesIO(header(b"packed", 0, 4, *shape)))


def test_memory_is_asked_for_as_data_come() -> None:
    """A frame that announces a gigabyte asks for no more than comes."""
    most = 0

    class Few(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal most
            most = max(most, size or 0)
            return super().read(size)

    with pytest.raises(StreamEndedError, match="the stream ended 1073741824 bytes"):
        read_frame(Few(header(b"packed", 3, 1, 1 << 30, 1, 1, 1)))
    assert most <= 1 << 20


def test_frames_are_found_again() -> None:
    stream = Frames(io.BytesIO(b"NSNSQ" + answer(1) + b"NSQ1NSQ1" + answer(2)))
    found = []
    for _ in range(9):
        try:
            if (one := stream.read_frame()) is None:
                break
            found.append(one["packed"].tolist())
        except FrameError:
            assert stream.skip()
    assert found == [[1], [2]]


@pytest.mark.parametrize("field", ["block_size", "sink_tokens", "outlier_channels"])
def test_numbers_of_a_scheme_that_no_frame_holds(field: str) -> None:
    """They are refused by name; the largest one is held."""
    most = Scheme(**{field: 2**31 - 1})  # type: ignore[arg-type]
    assert scheme_of(scheme_array(most)) == most
    for number in (2**31, 2**32, 2**32 + 1, 2**40, 2**63, 2**64):
        with pytest.raises(ValueError, match=f"^{field}={number} does not fit the int32"):
            scheme_array(Scheme(**{field: number}))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.uint8])
def test_a_scheme_of_another_dtype(kind: Any) -> None:
    with pytest.raises(ValueError, match="a scheme is int32"):
        scheme_of(scheme_array(Scheme()).astype(kind))
