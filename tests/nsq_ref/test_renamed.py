"""Earlier names of public modules."""

from __future__ import annotations

import importlib
import sys

import pytest

import nsq_ref
import onnx_export
from nsq_ref.renamed import Renamed

NAMES = {**nsq_ref.RENAMED, **onnx_export.RENAMED}


@pytest.mark.parametrize("old", NAMES)
def test_both_names_give_one_module(old: str) -> None:
    new = importlib.import_module(NAMES[old])
    assert importlib.import_module(old) is new
    assert new.__spec__.name == new.__name__ == NAMES[old]
    parent, _, name = old.rpartition(".")
    assert getattr(sys.modules[parent], name) is new


def test_other_names_are_not_found() -> None:
    assert Renamed({"nsq_ref.a": "nsq_ref.metrics"}).find_spec("nsq_ref.b") is None
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'nsq_ref\.a'"):
        importlib.import_module("nsq_ref.a")
