"""What the judge finds, and the verdict over a run. `report` turns it into text, JSON and XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nsq_ref.conformance.family import FAMILY
from nsq_ref.conformance.operations import Case, Failure
from nsq_ref.scheme import Scheme

__all__ = ["Diagnosis", "Explained", "Finding", "Report", "SchemeReport"]


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
class Diagnosis:
    """A known mistake that, made in the reference, gives what the port gave.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    rule : str
        The rule that the mistake breaks.
    mistake : str
        Its name in `mistakes.MISTAKES`, or empty where no known mistake fits.
    says : str
        A sentence for the implementer, counts included.
    stages : tuple of str
        The stages that it explains.
    findings : tuple of Finding
        What it explains, the clearest first.
    alike : tuple of str
        Other mistakes of which these cases cannot tell it.
    """

    rule: str
    mistake: str
    says: str
    stages: tuple[str, ...]
    findings: tuple[Finding, ...]
    alike: tuple[str, ...] = ()


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
    """

    port: str
    seed: int
    latitudes: tuple[str, ...]
    schemes: Sequence[SchemeReport]
    partial: bool = False
    command: str = ""
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def conforms(self) -> bool:
        """Whether all that was asked was answered rightly, and anything was asked."""
        return bool(self.schemes) and all(map(self.conforms_to, self.schemes))

    def conforms_to(self, one: SchemeReport) -> bool:
        """Return whether all that was asked of one scheme was answered rightly, and anything."""
        return (
            not one.diagnoses
            and not one.failures
            and (self.partial or not one.not_implemented)
            and sum(one.judged.values()) > 0
        )
