"""What each name means, field by field: a name that changes its meaning is seen here."""

from __future__ import annotations

from typing import Any

import pytest

from nsq_ref.scheme import Scheme, scheme_names

DEFAULTS: dict[str, Any] = {
    "bits": 4, "separate_norm": True, "axis": "channel", "symmetric": True,
    "scale_rule": "range", "magnitude": "norm", "block_size": None, "sink_tokens": 0,
    "outlier_channels": 0, "scale_dtype": "float16", "norm_dtype": "float16",
}  # fmt: skip
# What differs from the defaults, by family; widths are in the names.
FAMILIES: dict[str, dict[str, Any]] = {
    "naive": {"separate_norm": False, "axis": "token"},
    "nsep": {"axis": "token"},
    "pchan": {"separate_norm": False},
    "outlier": {"separate_norm": False, "axis": "token", "outlier_channels": 4},
    "nsep+out": {"axis": "token", "outlier_channels": 4},
    "nsep+pchan": {},
    "streaming": {"symmetric": False, "magnitude": "lsq", "block_size": 128, "sink_tokens": 1},
}
EXPECTED: dict[str, dict[str, Any]] = {
    f"{family}{bits}": {"bits": bits, **own}
    for family, own in FAMILIES.items()
    for bits in (2, 3, 4, 8)
}
EXPECTED["streaming2"]["scale_rule"] = "search"
EXPECTED_PAIRS = {
    "KIVI-K2V4": ("pchan2", "pchan4"),
    "KIVI-K3V8": ("pchan3", "pchan8"),
    "nsep+KIVI": ("nsep+pchan2", "nsep+pchan4"),
    "nsep+KIVI-K4V2": ("nsep+pchan4", "nsep+pchan2"),
}


def test_the_defaults_are_the_paper_s_scheme() -> None:
    assert Scheme().to_dict() == DEFAULTS


def test_every_name_is_in_the_table() -> None:
    assert scheme_names() == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_name_means_these_fields_and_no_others(name: str) -> None:
    scheme = Scheme.named(name)
    assert isinstance(scheme, Scheme)
    assert scheme.to_dict() == DEFAULTS | EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED_PAIRS)
def test_a_pair_is_made_of_named_schemes(name: str) -> None:
    assert tuple(Scheme.named(name)) == tuple(map(Scheme.named, EXPECTED_PAIRS[name]))  # type: ignore[arg-type]


def test_names_differ_in_more_than_their_letters() -> None:
    assert len(set(map(Scheme.named, scheme_names()))) == len(scheme_names())


@pytest.mark.parametrize(
    ("size", "sinks", "length", "cut"),
    [
        (4, 2, 0, (0, 0, 0)),
        (4, 2, 1, (1, 0, 0)),
        (4, 2, 5, (2, 0, 3)),
        (4, 2, 6, (2, 4, 0)),
        (4, 0, 11, (0, 8, 3)),
        (1, 1, 3, (1, 2, 0)),
        (None, 1, 9, (1, 0, 8)),
    ],
)
def test_cut(size: int | None, sinks: int, length: int, cut: tuple[int, int, int]) -> None:
    """K1, B1: sinks first, then full blocks; what is left waits in the tail."""
    assert Scheme(block_size=size, sink_tokens=sinks).cut(length) == cut


def test_cut_refuses() -> None:
    with pytest.raises(ValueError, match="length=-1"):
        Scheme().cut(-1)
