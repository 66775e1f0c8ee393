"""What the judge finds, and the verdict over a run. `report` turns it into text, JSON and XML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nsq_ref.conformance.family import FAMILY
from nsq_ref.conformance.operations import OPERATIONS, OPTIONAL, Case, Failure, Operation
from nsq_ref.dtypes import Array
from nsq_ref.scheme import Scheme

__all__ = ["Deviation", "Diagnosis", "Explained", "Finding", "Report", "SchemeReport"]


@dataclass(frozen=True)
class Finding:
    """One stage of one case that is wrong.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    case : Case
    stage : str
        A name of `judge.STAGES`, such as ``codes``.
    rule : str
        The id of the rule that the stage breaks, as far as the case alone tells.
    what : str
        One sentence.
    index : tuple of int
        Of the first wrong element in its array; empty where no element is to blame.
    got, expected : str
        That element, floats in hexadecimal bits and decimal.
    shown : tuple of (str, str)
        What led to it: name and value, as ``("direction", "0x3dcccccd  0.1")``.
    wrong, of : int
        Elements that are wrong, and elements in all.
    """

    case: Case
    stage: str
    rule: str
    what: str
    index: tuple[int, ...] = ()
    got: str = ""
    expected: str = ""
    shown: tuple[tuple[str, str], ...] = ()
    wrong: int = 0
    of: int = 0


@dataclass(frozen=True)
class Explained:
    """A difference that a named latitude allows, with the witness that shows it.

    Nothing changes one, so that threads may share it.
    """

    case: Case
    stage: str
    latitude: str
    index: tuple[int, ...]
    what: str
    count: int


@dataclass(frozen=True)
class Deviation:
    """A case of which the port's author knows that it fails.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    case : Case
    reason : str
        The author's.
    what : str
        What is wrong in it now; empty where it no longer fails.
    """

    case: Case
    reason: str
    what: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What explains some findings, or what they have in common where nothing does.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    rule : str
        The rule that is broken.
    mistake : str
        The name in `mistakes.MISTAKES` of what, made in the reference, gives what the port gave;
        empty where no known mistake does.
    says : str
        A sentence for the implementer, counts included.
    stages : tuple of str
        The stages that it explains.
    findings : tuple of Finding
        What it explains, the clearest first.
    alike : tuple of str
        Other mistakes, or rules, of which these cases cannot tell it.
    steps : int
        Where nothing else is wrong, by how many float32 steps a value is off; 0 otherwise.
    """

    rule: str
    mistake: str
    says: str
    stages: tuple[str, ...]
    findings: tuple[Finding, ...]
    alike: tuple[str, ...] = ()
    steps: int = 0


@dataclass(frozen=True)
class SchemeReport:
    """The verdict on one scheme.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    name : str
        Of the scheme, as the command line takes it.
    scheme : Scheme
    judged : mapping of str to int
        Operation to the number of cases that were asked and answered.
    stages : mapping of (str, str) to (int, int)
        Operation and stage to the cases in which it was judged and those in which it was wrong.
    diagnoses : sequence of Diagnosis
        The rules that are broken, the chief one first; each finding is in one of them.
    explained : sequence of Explained
    failures : sequence of (Case, Failure)
        Cases without an answer.
    not_implemented : sequence of Case
    reasons : sequence of str
        What the port said of them, each once.
    cases : sequence of Case
        All that were asked, in order.
    known, mended : sequence of Deviation
        Cases that fail as the port's author says, and those that no longer do. Findings and
        failures of known ones are nowhere else.
    """

    name: str
    scheme: Scheme
    judged: Mapping[str, int]
    stages: Mapping[tuple[str, str], tuple[int, int]]
    diagnoses: Sequence[Diagnosis] = ()
    explained: Sequence[Explained] = ()
    failures: Sequence[tuple[Case, Failure]] = ()
    not_implemented: Sequence[Case] = ()
    reasons: Sequence[str] = ()
    cases: Sequence[Case] = ()
    known: Sequence[Deviation] = ()
    mended: Sequence[Deviation] = ()

    def checked(self, operation: str) -> int:
        """Return how many cases of an operation the verdict rests on, of those that a port claims.

        Examples
        --------
        >>> SchemeReport("nsep4", Scheme(axis="token"), {"encode": 83}, {}).checked("encode")
        83
        """
        without = [*(case for case, _ in self.failures), *self.not_implemented]
        without += [one.case for one in self.known]
        return self.judged.get(operation, 0) + sum(one.operation == operation for one in without)

    @property
    def operations(self) -> list[Operation]:
        """All operations about which something can be asked: without blocks no cache grows.

        Examples
        --------
        >>> SchemeReport("nsep4", Scheme(axis="token"), {}, {}).operations
        ['encode', 'decode', 'attend', 'feedback']
        """
        has_blocks = self.scheme.block_size is not None
        return [name for name in OPERATIONS if has_blocks or not name.startswith("stream")]

    @property
    def title(self) -> str:
        """The name, and the fields in which the scheme differs from the one of that name.

        Examples
        --------
        >>> SchemeReport("nsep4", Scheme(bits=3, axis="token"), {}, {}).title
        'nsep4 with bits=3'
        """
        usual = FAMILY.get(self.name)
        if usual is None:
            return self.name
        changes = [
            f"{field}={value}"
            for field, value in self.scheme.to_dict().items()
            if value != getattr(usual, field)
        ]
        return f"{self.name} with {', '.join(changes)}" if changes else self.name


@dataclass(frozen=True)
class Report:
    """The verdict on a port.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    port : str
        What was checked, as the command line names it.
    seed : int
    latitudes : tuple of str
        Such as ``norm-ulp=1``; none by default.
    schemes : sequence of SchemeReport
    partial : bool
        Cases that the port does not implement are listed, not failed.
    command : str
        The command that repeats the run; `report` appends ``--scheme`` and ``--case`` to it.
    notes : sequence of str
        What else the reader should know.
    left_out : sequence of str
        What was not asked besides operations, such as ``float16 input``.
    required : sequence of str
        Operations and dtypes that must have been asked.
    """

    port: str
    seed: int
    latitudes: tuple[str, ...]
    schemes: Sequence[SchemeReport]
    partial: bool = False
    command: str = ""
    notes: Sequence[str] = field(default_factory=tuple)
    left_out: Sequence[str] = ()
    required: Sequence[str] = ()

    @property
    def conforms(self) -> bool:
        """Whether all that was asked was answered rightly, and anything and all required was."""
        answered = any(sum(one.judged.values()) for one in self.schemes)
        return answered and all(map(self.conforms_to, self.schemes)) and not self.unmet

    def conforms_to(self, one: SchemeReport) -> bool:
        """Return whether all that was asked of one scheme was answered rightly, and anything.

        In a partial check a scheme may be left out altogether.
        """
        return (
            not one.diagnoses
            and not one.failures
            and not one.mended
            and (self.partial or not one.not_implemented)
            and (sum(one.judged.values()) > 0 or bool(self.partial and one.not_implemented))
        )

    @property
    def not_asked(self) -> list[str]:
        """What was not asked: operations first, each with the schemes where not all lack it.

        Examples
        --------
        >>> one = SchemeReport("nsep4", Scheme(axis="token"), {"encode": 83}, {})
        >>> Report("mine", 0, (), [one], left_out=["float16 input"]).not_asked
        ['decode', 'attend', 'feedback', 'float16 input']
        """
        return [*self._without(lambda one, name: not _asked(one, name)), *self.left_out]

    @property
    def unclaimed(self) -> list[str]:
        """Operations that the port says it does not have, and need not have."""
        return self._without(lambda one, name: _asked(one, name) and not one.checked(name))

    @property
    def is_whole(self) -> bool:
        """Whether all of the schemes was asked and implemented, and nothing is a deviation.

        Without key feedback, which is an option, a port is whole, too.
        """
        missing = any(one.not_implemented or one.known for one in self.schemes)
        not_asked = [name for name in self.not_asked if name not in OPTIONAL]
        return not (not_asked or self.unclaimed or missing)

    @property
    def unmet(self) -> list[str]:
        """What is required and was not asked, or is not implemented."""
        return [name for name in self.required if not self._met(name)]

    def _met(self, name: str) -> bool:
        if name not in OPERATIONS:  # a dtype
            return any(str(x.dtype) == name for x in self._inputs())
        about = [one for one in self.schemes if name in one.operations]
        return bool(about) and all(one.judged.get(name) for one in about)

    def _inputs(self) -> Iterator[Array]:
        for one in self.schemes:
            missing = {id(case) for case in one.not_implemented}
            for case in one.cases:
                if id(case) not in missing and "x" in case.inputs:
                    yield case.inputs["x"]

    def _without(self, lacks: Callable[[SchemeReport, Operation], bool]) -> list[str]:
        found = []
        for name in OPERATIONS:
            about = [one for one in self.schemes if name in one.operations]
            if names := [one.name for one in about if lacks(one, name)]:
                where = "" if len(names) == len(about) else f" of {', '.join(names)}"
                found.append(f"{name}{where}")
        return found


def _asked(one: SchemeReport, name: Operation) -> bool:
    """Whether a case of an operation was asked; reports of tests name none."""
    return bool(one.checked(name)) or any(case.operation == name for case in one.cases)
