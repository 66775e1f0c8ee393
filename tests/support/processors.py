"""Which kernels of the native library this machine can run.

Asked in a process of its own: the first session of a process decides some things for all others.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from nsq_ref import Scheme
from onnx_export.custom_ops import register
from onnx_export.operators import quantize_model


def runs(name: str) -> bool:
    """Whether NSQ_CPU may have this value here."""
    os.environ["NSQ_CPU"] = name
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    register(options)
    try:
        onnxruntime.InferenceSession(quantize_model(Scheme()).SerializeToString(), options)
    except RuntimeException as error:
        if "this machine cannot run" not in str(error):
            raise
        return False
    return True


@contextlib.contextmanager
def sessions_on(name: str) -> Iterator[None]:
    """Sessions that are made within run this instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSQ_CPU", name)
        yield


def asked() -> tuple[str, ...]:
    command = [sys.executable, "-m", "tests.support.processors"]
    root = Path(__file__).parents[2]
    return tuple(subprocess.check_output(command, cwd=root, text=True).split())


if __name__ == "__main__":
    print(*filter(runs, ("portable", "avx2", "avx512")))
else:
    CPUS = asked()
