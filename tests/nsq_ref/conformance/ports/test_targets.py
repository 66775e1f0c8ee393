"""What a command line names as what is to be checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsq_ref.conformance import ports
from nsq_ref.conformance.ports import (
    open_port,
)
from tests.support.asked import (
    FUNCTIONS,
    PORTS,
    arrays_of,
    case,
    equal,
    normal,
)


def test_a_link_to_a_program_is_run_by_its_own_name(tmp_path: Path) -> None:
    """As programs that look beside themselves, or go by their name, expect."""
    real, link = tmp_path / "real", tmp_path / "bin" / "right"
    real.write_text(f'#!/bin/sh\nexec {sys.executable} {PORTS / "program.py"} "$(basename "$0")"\n')
    real.chmod(0o755)
    link.parent.mkdir()
    link.symlink_to(real)
    port = open_port(str(link))
    arrays_of(port.ask(0, case()))
    port.close()


@pytest.mark.parametrize("name", ["libmine.so", "libmine.so.1", "libmine.so.1.2.3", "m.dylib"])
def test_names_of_libraries(tmp_path: Path, name: str) -> None:
    """Also where they are executable, as linkers make them."""
    (tmp_path / name).write_bytes(b"")
    (tmp_path / name).chmod(0o755)
    assert ports.target_kind(str(tmp_path / name)) == "library"


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ({}, "nothing to check was given"),
        ({"encode": "./no_such_program"}, "there is no file ./no_such_program"),
        ({"encode": "no/such/file.py:encode"}, "there is no file no/such/file.py"),
        ({"encode": FUNCTIONS}, "functions.py:encode"),
        ({"encode": str(PORTS)}, "is a folder; name what is in it, or judge the answers"),
        ({"encode": ""}, "a target is empty"),
        ({"encode": "nsq_ref:quantize", "decode": ""}, "a target is empty"),
        ({"encode": "nsq_ref:"}, "names no Python function"),
        ({"encode": "no_such_module:f"}, "no_such_module cannot be imported: ModuleNotFoundError"),
        ({"encode": "nsq_ref:no_such"}, "nsq_ref has no no_such"),
        ({"encode": str(PORTS / "library.c")}, "is not executable; for a program, run chmod"),
        ({"encode": "nsq_ref:quantize", "custom_ops": "a.so"}, "is for ONNX models"),
        ({"encode": "/bin/sh", "decode": "nsq_ref:dequantize"}, "given first and alone"),
        ({"decode": "/bin/sh"}, "given first and alone"),
        ({"encode": "/bin/true"}, "/bin/true did not start: it ended with exit code 0"),
    ],
)
def test_targets_that_make_no_sense(targets: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        open_port(**targets)
    assert says in str(error.value)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_bytes(b"\0\1\2 no program")
    file.chmod(0o755)
    with pytest.raises(ValueError, match="mine cannot be run: Exec format error"):
        open_port(str(file))


def test_an_executable_is_a_program(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text(f"#!/bin/sh\nexec {sys.executable} {PORTS / 'program.py'} right\n")
    file.chmod(0o755)
    port = open_port(str(file))
    x = normal(1, 1)
    equal(arrays_of(port.ask(5, case(x=x))), {"packed": x.view(np.uint8)})
    port.close()
