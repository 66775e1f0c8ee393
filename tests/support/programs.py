"""Programs of the documentation in other languages, as `nsq check` sees them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from nsq_ref.conformance import vectors
from tests.support.command import said

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

# Together they go through every branch of a codec that the named schemes leave out: a search,
# balanced norms, float32 scales, where a fused multiply-add shows, bfloat16.
OTHER_FIELDS = [
    "bits=3 axis=token symmetric=false scale_rule=search outlier_channels=2 norm_dtype=float32",
    "bits=2 symmetric=false norm_rule=balanced magnitude=gain block_size=16 sink_tokens=2 "
    "scale_dtype=float32",
    "bits=8 magnitude=lsq block_size=16 outlier_channels=1 scale_dtype=bfloat16",
]
# Mistakes: the rule that is named first, and what is said. Each language has lines of its own.
HALF_AWAY = ("Q1", "exact ties are rounded away from zero")
FOLDED = ("D1", "decoded values are (norm / ||y||) * y")
FUSED = ("F1", "error * factor is fused with the difference")
FLOAT32_NORM = ("N1", "norms agree with a sequential float32 sum of squares")


def source(name: str) -> str:
    """Return an example of the documentation."""
    return (EXAMPLES / name).read_text(encoding="utf-8")


def wrong(text: str, right: str, mistake: str) -> str:
    """Return the source with one mistake in it."""
    assert text.count(right) == 1
    return text.replace(right, mistake)


def set_options(fields: str) -> list[str]:
    """Return the options of ``nsq check`` for ``field=value`` one after the other."""
    return [word for field in fields.split() for word in ("--set", field)]


def conforms(program: Path, *options: str) -> str:
    """Ask all that there is, key feedback too; return the report as one line."""
    given = [program, "--feedback", program, "--stream-feedback", program, *options]
    report = said("check", *given, "--require", "encode,decode,feedback")
    return " ".join(report.split())


def does_not_conform(program: Path | Sequence[str], found: tuple[str, str], *options: str) -> None:
    """The report names the rule of the mistake first, and says what the mistake is."""
    given = [program] if isinstance(program, Path) else program
    report = said("check", *given, *options, code=1)
    rules = re.findall(r"^([A-Z]\d)  ", report, re.MULTILINE)
    assert rules[0] == found[0], report
    assert found[1] in " ".join(report.split())


def feeds_back_wrongly(program: Path, found: tuple[str, str]) -> None:
    """So it is in all cases of key feedback, of which one alone may have several reasons."""
    options = ["--operation", "feedback", "--dtype", "float32"]
    does_not_conform([str(program), "--feedback", str(program)], found, *options)


def judges_itself(command: list[str | Path], folder: Path, code: int = 0) -> str:
    """Run the port on the vectors in a folder, or on the shipped ones; return the last line."""
    done = subprocess.run(
        [*command, folder], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout.strip()


def number_of_judged() -> int:
    """How many outcomes a port tells that judges itself: cases, and two for each large file."""
    large = list(vectors.FOLDER.glob("large-*.safetensors"))
    return sum(len(vectors.load(name)) for name in vectors.names()) + 2 * len(large)
