"""Compile C sources of the tests, with the compiler that comes as a Python package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

INCLUDE = Path(__file__).parents[2] / "nsq_ref" / "conformance"


def compile_library(source: Path, output: Path, *flags: str) -> Path:
    """Compile a C file to a shared library that finds ``nsq.h``."""
    # Contraction would fuse multiply-adds; the sanitizer is zig's default and is not portable.
    options = ["-shared", "-fPIC", "-O2", "-ffp-contract=off", "-fno-sanitize=undefined"]
    return compile_program(source, output, *options, f"-I{INCLUDE}", *flags)


def compile_program(source: Path, output: Path, *flags: str) -> Path:
    """Compile a C file."""
    command = [sys.executable, "-m", "ziglang", "cc", *flags, str(source), "-o", str(output)]
    subprocess.run(command, check=True)
    return output
