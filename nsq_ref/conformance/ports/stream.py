"""Answers that a program writes one after the other: ``nsq gen | ./mine | nsq verify``."""

from __future__ import annotations

from typing import BinaryIO

from nsq_ref.conformance.operations import Answer, Case, Failure, Port
from nsq_ref.conformance.ports.frames import Frame, FrameError, Frames, StreamEndedError
from nsq_ref.conformance.ports.messages import answer_of, no_answer, number_in

MOST_ODDITIES = 3  # that a message names


class Stream(Port):
    """Answers that come one after the other, in the order of the cases.

    Whatever else comes is a failure of the case in whose place it comes, or behind whose answer:
    another answer to a case, one to a case that was not asked or whose turn is over, and what is no
    frame. The cases that follow are judged as if it were not there.

    For one thread: ``stream``, behind the header, which `read_hello` reads, is read to its end.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> from nsq_ref import Scheme
    >>> from nsq_ref.conformance.operations import NOT_IMPLEMENTED
    >>> from nsq_ref.conformance.ports.frames import write_frame
    >>> from nsq_ref.conformance.ports.messages import reply_of
    >>> stream = io.BytesIO()
    >>> write_frame(stream, reply_of(0, Answer(NOT_IMPLEMENTED, {})))
    >>> _ = stream.seek(0)
    >>> port = Stream("mine", stream)
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> port.ask(0, case).status == NOT_IMPLEMENTED
    True
    >>> port.ask(1, case)
    Failure(kind='missing', message='the stream ended after case 0')
    """

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name = name
        self.cases: int | None = None  # of the run, where all of them are asked
        self._frames = Frames(stream)
        self._ahead: Frame | None = None  # the next answer
        self._coming = -1  # the case that it answers
        self._last = -1  # the case of the answer before it
        self._passed: set[int] = set()  # all cases of earlier answers
        self._odd: list[str] = []  # what came between these two
        self._ended = ""  # why there is no next answer

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Return the answer to a case, which is missing if the stream goes on with a later one."""
        frame = self._next()
        before = self._oddity() if self._last < 0 else None
        while frame is not None and self._coming < number:  # a case that nobody asks about
            frame, before = self._pass(), None
        if frame is None or self._coming > number:
            gone_on = f"{self._place()} the stream goes on with case {self._coming}"
            return before or self._oddity() or Failure("missing", self._ended or gone_on)
        answer = answer_of(frame, number)
        behind = self._pass()
        # What came in place of the next answer is told of the case that has none.
        if (behind is None and self.cases in (None, number + 1)) or self._coming == number + 1:
            return before or self._oddity() or answer
        return before or answer

    def _place(self) -> str:
        return "before any answer" if self._last < 0 else f"after case {self._last}"

    def _oddity(self) -> Failure | None:
        odd, self._odd = self._odd, []
        if not odd:
            return None
        more = [f"and {len(odd) - MOST_ODDITIES} more"] if len(odd) > MOST_ODDITIES else []
        came = "; ".join([*odd[:MOST_ODDITIES], *more])
        return Failure("garbage", f"{self._place()} came {came}")

    def _pass(self) -> Frame | None:
        """Let go of the next answer, and return the one that follows."""
        self._passed.add(self._coming)
        self._last, self._ahead, self._odd = self._coming, None, []
        return self._next()

    def _next(self) -> Frame | None:
        """Return the next answer to a case whose turn is not over."""
        while self._ahead is None and not self._ended:
            try:
                frame = self._frames.read_frame()
            except FrameError as error:
                self._skip(error)
                continue
            if frame is None:
                self._ended = f"the stream ended {self._place()}"
                continue
            number = number_in(frame)
            if number is None:
                self._odd.append(no_answer(frame))
            elif number < 0 or (self.cases is not None and number >= self.cases):
                self._odd.append(f"an answer to case {number}, which was not asked")
            elif number in self._passed:
                self._odd.append(f"another answer to case {number}")
            elif number < self._last:
                self._odd.append(f"the answer to case {number}, out of order")
            else:
                self._ahead, self._coming = frame, number
        return self._ahead

    def _skip(self, error: FrameError) -> None:
        """Go on to the next frame behind what is none."""
        cut = isinstance(error, StreamEndedError)
        if self._frames.skip():
            self._odd.append(f"what is no frame: {error}")
        elif cut and self.cases != self._last + 1:
            self._ended = f"the stream ended {self._place()} in the midst of an answer ({error})"
        else:
            self._odd.append(f"what is no frame: {error}")
            self._ended = f"{self._place()} no other frame came"
