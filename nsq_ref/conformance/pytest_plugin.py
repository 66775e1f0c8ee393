"""A pytest plugin: one test for each case of the conformance kit.

``pytest --nsq-encode package.module:encode`` adds them to whatever else is tested. Every run of
pytest imports this module where nsq is installed, so that it imports what it needs only when it
is asked for something.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from nsq_ref.conformance.findings import Diagnosis, Explained, Finding
    from nsq_ref.conformance.judge import Latitudes
    from nsq_ref.conformance.operations import Answer, Case, Operation, Port
    from nsq_ref.scheme import Scheme

TARGETS = ("encode", "decode", "attend", "stream")
DTYPES = ("float32", "float16", "bfloat16")
LEAST_TIMEOUT = 0.1  # seconds
OPTIONS = ("custom_ops", "scheme", "all", "seed", "allow", "dtype", "timeout")


class Run(NamedTuple):
    """What the command line asked for."""

    targets: dict[str, str]
    schemes: list[tuple[str, Scheme]]
    operations: list[Operation]
    seed: int
    latitudes: Latitudes
    dtypes: list[str]
    refusals: bool
    custom_ops: str | None
    timeout: float
    command: str


RUN = pytest.StashKey[Run]()
PORT: pytest.StashKey[Port] = pytest.StashKey()


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
        option(operation, what, metavar="TARGET")
    many: dict[str, Any] = {"action": "append"}
    one = "a scheme to check; may be repeated (default: nsep+pchan4)"
    option("scheme", one, metavar="NAME", **many)
    option("all", "check all named schemes", action="store_true")
    option("seed", "seed of the drawn cases (default: 0)", type=int, metavar="N")
    one = "a difference to allow, such as norm-ulp=1; may be repeated"
    option("allow", one, metavar="LATITUDE", **many)
    option("dtype", "a dtype of the input; may be repeated (default: all)", choices=DTYPES, **many)
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
                "--nsq-decode, --nsq-attend or --nsq-stream"
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
        encode, decode, attend, stream = (run.targets.get(name) for name in TARGETS)
        port = open_port(encode, decode, attend, stream, run.custom_ops, run.timeout)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    session.config.stash[PORT] = port
    if _only_distributes(session.config):
        _close(session.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the port."""
    _close(session.config)


# First, so that -k and the like choose among these items too.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add an item for each case."""
    run = session.config.stash.get(RUN, None)
    if run is None:
        return
    added = []
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
    """Say what was judged, and what was not asked: passing tests alone do not tell."""
    run = config.stash.get(RUN, None)
    if run is None:
        return
    judged: dict[str, dict[str, int]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            if report.nodeid.startswith("nsq::nsq["):
                name, operation, _ = report.nodeid.removeprefix("nsq::nsq[").split("/", 2)
                counts = judged.setdefault(name, {})
                counts[operation] = counts.get(operation, 0) + 1
    for name, counts in judged.items():
        total = [f"{operation} {counts[operation]}" for operation in TARGETS if operation in counts]
        terminalreporter.write_line(f"nsq: {name}, cases judged: {', '.join(total)}")
    absent = [name for name in TARGETS if not any(name in counts for counts in judged.values())]
    absent += [f"{dtype} input" for dtype in DTYPES if dtype not in run.dtypes]
    absent += [] if run.refusals else ["input that must be refused, as a graph cannot refuse"]
    if absent:
        terminalreporter.write_line(f"nsq: not checked: {', '.join(absent)}")


class CaseItem(pytest.Item):
    """One case as a test: its number in the run, and the name of its scheme."""

    def __init__(self, *, number: int, scheme: str, case: Case, **node: Any) -> None:
        super().__init__(**node)
        self.number, self.scheme, self.case = number, scheme, case

    def runtest(self) -> None:
        """Ask the port and judge its answer."""
        from nsq_ref.conformance.operations import NOT_IMPLEMENTED, Failure
        from nsq_ref.conformance.report import case_name, finding_text, printable

        run = self.config.stash[RUN]
        answer = self.config.stash[PORT].ask(self.number, self.case)
        name = case_name(self.case)
        command = f"{run.command} --scheme {shlex.quote(self.scheme)} --case {shlex.quote(name)}"
        if isinstance(answer, Failure):
            raise WrongAnswer(f"{name}: {answer.kind}\n  {printable(answer.message)}\n  {command}")
        if answer.status == NOT_IMPLEMENTED:
            said = printable(answer.message) or "the port says so"
            if self.case.operation in run.targets:
                raise WrongAnswer(f"{name}: not implemented\n  {said}\n  {command}")
            pytest.skip(f"not implemented: {said}")
        diagnoses, explained = _verdict(self.case, answer, run.latitudes)
        for one in explained:
            text = f"allowed by {one.latitude}: {printable(one.what)}"
            self.user_properties.append(("nsq", text))
        if diagnoses:
            texts = [finding_text(_clearest(diagnosis)) for diagnosis in diagnoses]
            raise WrongAnswer("\n\n".join(texts) + f"\n\nJust this case:\n  {command}")

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
    from nsq_ref.conformance.family import FAMILY, scheme_named
    from nsq_ref.conformance.judge import Latitudes
    from nsq_ref.conformance.operations import OPERATIONS
    from nsq_ref.conformance.ports import target_kind

    names: list[str] = config.getoption("nsq_scheme") or ["nsep+pchan4"]
    if config.getoption("nsq_all"):
        if config.getoption("nsq_scheme"):
            raise ValueError("--nsq-all checks every named scheme; leave --nsq-scheme out")
        names = list(FAMILY)
    schemes = [(name, scheme_named(name)) for name in dict.fromkeys(names)]
    kind = target_kind(targets["encode"]) if "encode" in targets else ""
    does_all = kind in ("library", "program")
    allowed: list[str] = config.getoption("nsq_allow") or []
    seed: int = config.getoption("nsq_seed") or 0
    if seed < 0:
        raise ValueError(f"--nsq-seed {seed} must be at least 0")
    timeout: float | None = config.getoption("nsq_timeout")
    if timeout is not None and not timeout >= LEAST_TIMEOUT:
        raise ValueError(f"--nsq-timeout {timeout} must be at least {LEAST_TIMEOUT}")
    custom_ops: str | None = config.getoption("nsq_custom_ops")
    dtypes: list[str] = config.getoption("nsq_dtype") or []
    words = ["nsq", "check"]
    for name, target in targets.items():
        words += [target] if name == "encode" else [f"--{name}", target]
    words += ["--custom-ops", custom_ops] if custom_ops is not None else []
    words += ["--seed", str(seed)] if seed else []
    words += ["--timeout", f"{timeout:g}"] if timeout is not None else []
    for dtype in dtypes:
        words += ["--dtype", dtype]
    for latitude in allowed:
        words += ["--allow", latitude]
    return Run(
        targets,
        schemes,
        [operation for operation in OPERATIONS if does_all or operation in targets],
        seed,
        Latitudes.parse(allowed),
        dtypes or list(DTYPES),
        kind != "model",
        custom_ops,
        30.0 if timeout is None else timeout,
        shlex.join(words),
    )


def _cases(run: Run) -> Iterator[tuple[str, Case]]:
    from nsq_ref.conformance.cases import cases

    for name, scheme in run.schemes:
        for case in cases(scheme, run.operations, run.seed, run.dtypes):
            if run.refusals or case.refused_by is None:
                yield name, case


def _verdict(
    case: Case, answer: Answer, latitudes: Latitudes
) -> tuple[list[Diagnosis], list[Explained]]:
    from nsq_ref.conformance.judge import judge
    from nsq_ref.conformance.judge.diagnose import Judged, diagnose

    verdict = judge(case, answer, latitudes)
    return diagnose([Judged(case, answer, verdict.findings)], latitudes), verdict.explained


def _clearest(diagnosis: Diagnosis) -> Finding:
    """The first finding, with the rule and the words of the diagnosis, which knows more."""
    finding = diagnosis.findings[0]
    what = diagnosis.says if diagnosis.mistake else finding.what
    return replace(finding, rule=diagnosis.rule, what=what)


def _only_distributes(config: pytest.Config) -> bool:
    """Whether the tests run in workers of pytest-xdist, each of which starts a port of its own."""
    distributes: bool = config.getoption("dist", "no") != "no"
    return distributes and not hasattr(config, "workerinput")


def _close(config: pytest.Config) -> None:
    port = config.stash.get(PORT, None)
    if port is not None:
        del config.stash[PORT]
        port.close()
