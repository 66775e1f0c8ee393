"""Known deviations: a file in which a port's author says which cases fail, and why.

Each line has cases as reports list them, a colon, and a reason; ``#`` begins a comment line::

    encode/half-even/0 to 2, 100: the accelerator rounds ties away from zero, see issue 12
    nsep4/decode/ordinary/*: the decoder of this scheme is not written yet

A scheme before the operation makes a line one about this scheme alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nsq_ref.conformance.operations import OPERATIONS, Case

_MOST_BYTES = 1 << 20


class KnownLine(NamedTuple):
    """One line: whose cases, which of a family, and why they fail."""

    where: str  # file and line
    scheme: str  # empty for all
    family: str  # operation and flag, as encode/exact-tie
    members: str
    reason: str

    def names(self, scheme: str, case: Case) -> bool:
        """Return whether the line is about a case of the scheme of this name.

        Examples
        --------
        >>> from nsq_ref import Scheme
        >>> line = KnownLine("mine:1", "", "encode/ties", "0 to 2, 7", "of hardware")
        >>> [line.names("nsep4", Case(f"ties/{i}", "encode", Scheme(), (), {})) for i in (2, 3, 7)]
        [True, False, True]
        """
        if self.scheme not in ("", scheme):
            return False
        family, _, member = f"{case.operation}/{case.id}".rpartition("/")
        return family == self.family and any(
            _is_among(member, part.strip()) for part in self.members.split(",")
        )


def _is_among(member: str, part: str) -> bool:
    first, to, last = part.partition(" to ")
    if to and member.isdecimal():
        return int(first) <= int(member) <= int(last)
    return part in ("*", member)


_LINE = re.compile(
    rf"(?:(?P<scheme>[^/:]+)/)?(?P<family>(?:{'|'.join(OPERATIONS)})/[^/:]+)/(?P<members>[^/:]+?)"
    r"\s*:\s*(?P<reason>.*)"
)
_MEMBERS = re.compile(r"(\*|\d{1,9}( to \d{1,9})?)(\s*,\s*(\*|\d{1,9}( to \d{1,9})?))*")


def read_known(path: str | Path) -> list[KnownLine]:
    """Read a file of known deviations.

    Raises
    ------
    OSError
        Where it cannot be read.
    ValueError
        For a line that names no cases or no reason.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "known"
    ...     _ = file.write_text("encode/exact-tie/0 to 3: ties are rounded away")
    ...     [line.reason for line in read_known(file)]
    ['ties are rounded away']
    """
    path = Path(path)
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes; it is no list of cases")
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        where, text = f"{path}:{number}", line.strip()
        if not text or text.startswith("#"):
            continue
        parts = _LINE.fullmatch(text)
        if parts is None or not _MEMBERS.fullmatch(parts["members"]):
            raise ValueError(
                f"{where} names no cases: {text!r:.100}; write as encode/exact-tie/0 to 3: why"
            )
        if not parts["reason"].strip():
            raise ValueError(f"{where} gives no reason; write it behind the colon")
        scheme, family = parts["scheme"] or "", parts["family"]
        found.append(KnownLine(where, scheme, family, parts["members"], parts["reason"].strip()))
    return found


def reasons_of(
    lines: Sequence[KnownLine], scheme: str, cases: Iterable[Case]
) -> Mapping[int, KnownLine]:
    """Return the line about each case, by the case's ``id()``; the first that names it.

    Examples
    --------
    >>> reasons_of([], "nsep4", [])
    {}
    """
    found: dict[int, KnownLine] = {}
    for case in cases:
        line = next((one for one in lines if one.names(scheme, case)), None)
        if line is not None:
            found[id(case)] = line
    return found
