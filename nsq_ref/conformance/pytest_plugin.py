"""A pytest plugin: one test for each case of the conformance kit.

``pytest --nsq-encode package.module:encode`` adds them to whatever else is tested. Every run of
pytest imports this module where nsq is installed, so that it imports what it needs only when it
is asked for something.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import pickle
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from nsq_ref.conformance.findings import Report
    from nsq_ref.conformance.known import KnownLine
    from nsq_ref.conformance.operations import Case, Operation, Port
    from nsq_ref.conformance.session import Session
    from nsq_ref.scheme import Scheme

TARGETS = ("encode", "decode", "attend", "stream", "feedback", "stream_feedback")
DTYPES = ("float32", "float16", "bfloat16")
LEAST_TIMEOUT = 0.1  # seconds
OPTIONS = (
    "custom_ops", "scheme", "set", "all", "case", "operation", "seed", "allow", "dtype", "partial",
    "quick", "require", "known", "timeout",
)  # fmt: skip


class Run(NamedTuple):
    """What the command line asked for."""

    targets: dict[str, str]
    schemes: list[tuple[str, Scheme]]
    operations: list[Operation]
    claimed: list[Operation]
    seed: int
    latitudes: list[str]
    dtypes: list[str]
    only: str | None
    partial: bool
    quick: bool
    require: list[str]
    known: list[KnownLine]
    refusals: bool
    custom_ops: str | None
    timeout: float
    command: str


RUN = pytest.StashKey[Run]()
PORT: pytest.StashKey[Port] = pytest.StashKey()
SESSIONS: pytest.StashKey[dict[str, Session]] = pytest.StashKey()
REPORT: pytest.StashKey[Report] = pytest.StashKey()
FROM_WORKERS = pytest.StashKey[list[bytes]]()


class WrongAnswer(Exception):  # noqa: N818 - the port's error, not ours
    """The port failed a case; the message is what the reader sees."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options ``--nsq-*``."""
    group = parser.getgroup("nsq", "conformance of an implementation to NSQ-1")
    what = "package.module:function, file.py:function, a shared library or an ONNX model"

    def option(name: str, words: str, **kind: Any) -> None:
        group.addoption(f"--nsq-{name}", help=words, **kind)

    does_all = "or a program; libraries and programs do all operations"
    option("encode", f"what quantizes: {what}, {does_all}", metavar="TARGET")
    for operation in TARGETS[1:]:
        option(operation.replace("_", "-"), what, metavar="TARGET")
    many: dict[str, Any] = {"action": "append"}
    one = "a scheme to check; may be repeated (default: nsep+pchan4)"
    option("scheme", one, metavar="NAME", **many)
    option("set", "change a field of the scheme; may be repeated", metavar="FIELD=VALUE", **many)
    option("all", "check all named schemes", action="store_true")
    option("case", "one case only, as encode/exact-tie/3", metavar="ID")
    one = "an operation to check; may be repeated (default: all without key feedback)"
    option("operation", one, choices=TARGETS, **many)
    option("seed", "seed of the drawn cases (default: 0)", type=int, metavar="N")
    one = "a difference to allow, such as norm-ulp=1; may be repeated"
    option("allow", one, metavar="LATITUDE", **many)
    option("dtype", "a dtype of the input; may be repeated (default: all)", choices=DTYPES, **many)
    option("partial", "skip what the port says it does not implement", action="store_true")
    option("quick", "one case of a kind, for while you write", action="store_true")
    one = "fail unless these were asked: operations and dtypes, as encode,decode,float16"
    option("require", one, metavar="LIST")
    option("known", "cases that fail, and why; each must still fail", metavar="FILE")
    option("custom-ops", "operators that ONNX models need", metavar="FILE")
    option("timeout", "seconds for one answer (default: 30)", type=float, metavar="S")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; refuse those that make no sense."""
    named = ((name, config.getoption(f"nsq_{name}")) for name in TARGETS)
    targets = {name: target for name, target in named if target is not None}
    if targets:
        try:
            config.stash[RUN] = _run_of(config, targets)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        return
    for name in OPTIONS:
        value = config.getoption(f"nsq_{name}")
        if value is not None and value is not False:
            raise pytest.UsageError(
                f"--nsq-{name.replace('_', '-')} needs something to check; give --nsq-encode, "
                "--nsq-decode, --nsq-attend, --nsq-stream, --nsq-feedback or "
                "--nsq-stream-feedback"
            )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is checked."""
    run = config.stash.get(RUN, None)
    return None if run is None else f"nsq: {run.command}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the port, so that a target that does not exist is bad use and not a failed test."""
    run = session.config.stash.get(RUN, None)
    if run is None:
        return
    from nsq_ref.conformance.ports import open_port

    try:
        named = (run.targets.get(name) for name in TARGETS)
        encode, decode, attend, stream, feedback, stream_feedback = named
        port = open_port(
            encode, decode, attend, stream, run.custom_ops, run.timeout, feedback=feedback,
            stream_feedback=stream_feedback,
        )  # fmt: skip
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    session.config.stash[PORT] = port
    if _only_distributes(session.config):
        _close(session.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ask some cases again, end the port, and judge all together."""
    config = session.config
    run, port = config.stash.get(RUN, None), config.stash.get(PORT, None)
    if run is None:
        return
    sessions = _sessions(config, run)
    try:
        if port is not None:
            for one in sessions.values():
                one.ask_again(port)
    finally:
        _close(config)
    if hasattr(config, "workeroutput"):
        config.workeroutput["nsq"] = pickle.dumps(_told(sessions))
        return
    name = ", ".join(dict.fromkeys(run.targets.values()))
    config.stash[REPORT] = report = _report(config, run, sessions, name)
    if not report.conforms and any(one.cases for one in report.schemes) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker of pytest-xdist was answered."""
    told = getattr(node, "workeroutput", {}).get("nsq")
    if told is not None:
        node.config.stash.setdefault(FROM_WORKERS, []).append(told)


# First, so that -k and the like choose among these items too.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add an item for each case."""
    run = session.config.stash.get(RUN, None)
    if run is None:
        return
    added = []
    if run.only is not None and not any(True for _ in _cases(run)):
        raise pytest.UsageError(f"--nsq-case {run.only} is not among what is asked")
    for number, (name, case) in enumerate(_cases(run)):
        title = f"nsq[{name}/{case.operation}/{case.id}]"
        # The part before :: stands for the file, as JUnit files and schedulers expect one.
        place = {"name": title, "nodeid": f"nsq::{title}"}
        added.append(CaseItem.from_parent(session, **place, number=number, scheme=name, case=case))
    items += added
    # So that the terminal counts them.
    report = pytest.CollectReport("nsq", "passed", longrepr=None, result=list(added))
    session.ihook.pytest_collectreport(report=report)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what `nsq check` would, once: passing tests alone do not tell what was not asked."""
    report = config.stash.get(REPORT, None)
    if report is None:
        return
    from nsq_ref.conformance.report import as_text

    terminalreporter.section("nsq")
    for line in as_text(report, color=terminalreporter.hasmarkup).splitlines():
        terminalreporter.write_line(line)


class CaseItem(pytest.Item):
    """One case as a test: its number in the run, and the name of its scheme."""

    def __init__(self, *, number: int, scheme: str, case: Case, **node: Any) -> None:
        super().__init__(**node)
        self.number, self.scheme, self.case = number, scheme, case

    def runtest(self) -> None:
        """Ask the port and judge its answer."""
        from nsq_ref.conformance.operations import Failure
        from nsq_ref.conformance.report import case_name, finding_text, printable

        run = self.config.stash[RUN]
        session = _sessions(self.config, run)[self.scheme]
        answer = self.config.stash[PORT].ask(self.number, self.case)
        verdict = session.take(self.number, self.case, answer)
        name, text = case_name(self.case), ""
        command = f"{run.command} --scheme {shlex.quote(self.scheme)} --case {shlex.quote(name)}"
        if isinstance(answer, Failure):
            text = f"{name}: {answer.kind}\n  {printable(answer.message)}\n  {command}"
        elif verdict is None:
            said = printable(answer.message) or "the port says so"
            if run.partial or self.case.operation not in run.claimed:
                pytest.skip(f"not implemented: {said}")
            text = f"{name}: not implemented\n  {said}\n  {command}"
        else:
            for one in verdict.explained:
                allowed = f"allowed by {one.latitude}: {printable(one.what)}"
                self.user_properties.append(("nsq", allowed))
            if verdict.findings:
                texts = [finding_text(finding) for finding in verdict.findings]
                text = "\n\n".join(texts) + f"\n\nJust this case:\n  {command}"
        known = next((line for line in run.known if line.names(self.scheme, self.case)), None)
        if known is not None and text:
            pytest.xfail(known.reason)
        if known is not None:
            raise WrongAnswer(
                f"{name} no longer fails; take it out of the known deviations ({known.where})"
            )
        if text:
            raise WrongAnswer(text)

    def repr_failure(
        self,
        excinfo: pytest.ExceptionInfo[BaseException],
        style: Any = None,
    ) -> Any:
        """Show what is wrong with the port; a traceback only for errors of the kit."""
        if isinstance(excinfo.value, WrongAnswer):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Return the place, which is no file, and the name."""
        return self.path, None, self.name


def _run_of(config: pytest.Config, targets: dict[str, str]) -> Run:
    from nsq_ref.conformance.check import REQUIRABLE
    from nsq_ref.conformance.family import FAMILY, scheme_named
    from nsq_ref.conformance.judge import Latitudes
    from nsq_ref.conformance.known import read_known
    from nsq_ref.conformance.operations import OPERATIONS, USUAL
    from nsq_ref.conformance.ports import target_kind
    from nsq_ref.policy import changed_fields

    given = {name: config.getoption(f"nsq_{name}") for name in OPTIONS}
    if given["all"] and (given["scheme"] or given["set"]):
        other = "scheme" if given["scheme"] else "set"
        raise ValueError(f"--nsq-all checks every named scheme; leave --nsq-{other} out")
    names: list[str] = list(FAMILY) if given["all"] else given["scheme"] or ["nsep+pchan4"]
    fields = changed_fields(given["set"] or ())
    schemes = [(name, replace(scheme_named(name), **fields)) for name in dict.fromkeys(names)]
    kind = target_kind(targets["encode"]) if "encode" in targets else ""
    does_all = kind in ("library", "program")
    encoders = [targets[one] for one in ("encode", "feedback", "stream_feedback") if one in targets]
    graphs = given["custom_ops"] is None and "model" in map(target_kind, encoders)
    asked = [
        name for name in OPERATIONS if name in targets or (does_all and name in USUAL)
    ]  # fmt: skip
    claimed = [operation for operation in asked if operation in targets]
    if given["operation"]:
        if absent := [name for name in given["operation"] if name not in asked]:
            raise ValueError(f"--nsq-operation {absent[0]}: nothing was given that does it")
        asked = claimed = [name for name in asked if name in given["operation"]]
    seed: int = given["seed"] or 0
    if seed < 0:
        raise ValueError(f"--nsq-seed {seed} must be at least 0")
    timeout: float | None = given["timeout"]
    if timeout is not None and not timeout >= LEAST_TIMEOUT:
        raise ValueError(f"--nsq-timeout {timeout} must be at least {LEAST_TIMEOUT}")
    require = [name.strip() for name in given["require"].split(",")] if given["require"] else []
    if unknown := [name for name in require if name not in REQUIRABLE]:
        raise ValueError(f"--nsq-require {unknown[0]} is not one of {', '.join(REQUIRABLE)}")
    Latitudes.parse(given["allow"] or [])
    words = ["nsq", "check"]
    for name, target in targets.items():
        words += [target] if name == "encode" else [f"--{name.replace('_', '-')}", target]
    words += [] if given["custom_ops"] is None else ["--custom-ops", given["custom_ops"]]
    words += ["--seed", str(seed)] if seed else []
    words += ["--timeout", f"{timeout:g}"] if timeout is not None else []
    for name in ("set", "dtype", "allow"):
        words += [word for one in given[name] or () for word in (f"--{name}", one)]
    words += [f"--{name}" for name in ("partial", "quick") if given[name]]
    words += [] if given["known"] is None else ["--known", given["known"]]
    try:
        known = [] if given["known"] is None else read_known(Path(given["known"]))
    except OSError as error:
        raise ValueError(f"--nsq-known {given['known']}: {error.strerror}") from error
    return Run(
        targets, schemes, asked, [n for n in OPERATIONS if n in claimed or n in require], seed,
        given["allow"] or [], given["dtype"] or list(DTYPES), given["case"], given["partial"],
        given["quick"], require, known, not graphs,
        given["custom_ops"], 30.0 if timeout is None else timeout, shlex.join(words),
    )  # fmt: skip


def _cases(run: Run) -> Iterator[tuple[str, Case]]:
    from nsq_ref.conformance.cases import cases

    for name, scheme in run.schemes:
        for case in cases(scheme, run.operations, run.seed, run.dtypes, quick=run.quick):
            if (run.refusals or case.refused_by is None) and (
                run.only in (None, f"{case.operation}/{case.id}")
            ):
                yield name, case


def _sessions(config: pytest.Config, run: Run) -> dict[str, Session]:
    """Return what was asked about each scheme."""
    from nsq_ref.conformance.judge import Latitudes
    from nsq_ref.conformance.session import Session

    if SESSIONS not in config.stash:
        allowed = Latitudes.parse(run.latitudes)
        config.stash[SESSIONS] = {
            name: Session(name, scheme, allowed, run.claimed, {}) for name, scheme in run.schemes
        }
    return config.stash[SESSIONS]


def _told(sessions: dict[str, Session]) -> list[Any]:
    """Return what a worker was answered, without the cases, which every process can make."""
    return [
        (number, answer, [
            (f.stage, f.rule, f.what) for f in (v.findings if v else ())
            if f.stage in ("again", "chance")
        ])
        for one in sessions.values()
        for number, case, answer in one.asked
        for v in [one.verdicts.get(id(case))]
    ]  # fmt: skip


def _report(config: pytest.Config, run: Run, sessions: dict[str, Session], name: str) -> Report:
    """Judge all together; what workers of pytest-xdist were answered, too."""
    from nsq_ref.conformance.findings import Finding, Report
    from nsq_ref.conformance.known import reasons_of

    everything = list(_cases(run))
    for text in config.stash.get(FROM_WORKERS, []):
        for number, answer, repeated in pickle.loads(text):
            scheme, case = everything[number]
            verdict = sessions[scheme].take(number, case, answer)
            for stage, rule, what in repeated:
                if verdict is not None:
                    verdict.findings.insert(0, Finding(case, stage, rule, what))
                    verdict.stages.insert(0, stage)
    asked = 0
    for scheme, one in sessions.items():
        one.known = reasons_of(run.known, scheme, (case for _, case, _ in one.asked))
        asked += len(one.asked)
    absent = [dtype for dtype in DTYPES if dtype not in run.dtypes]
    left_out = [f"{' and '.join(absent)} input"] if absent else []
    left_out += [] if run.refusals else ["input that must be refused, as a graph cannot refuse"]
    left_out += ["all but a case of a kind, as this was a quick run"] if run.quick else []
    left_out += [] if run.only is None else [f"all cases but {run.only}"]
    if asked < len(everything):
        left_out.append(f"{len(everything) - asked} cases that pytest did not run")
    reports = [one.report() for one in sessions.values()]
    return Report(
        name, run.seed, tuple(run.latitudes), reports, run.partial, run.command, (), left_out,
        run.require,
    )  # fmt: skip


def _only_distributes(config: pytest.Config) -> bool:
    """Whether the tests run in workers of pytest-xdist, each of which starts a port of its own."""
    distributes: bool = config.getoption("dist", "no") != "no"
    return distributes and not hasattr(config, "workerinput")


def _close(config: pytest.Config) -> None:
    port = config.stash.get(PORT, None)
    if port is not None:
        del config.stash[PORT]
        port.close()
