"""One intake: every array, integer and scheme is taken as NumPy's, or refused by name."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsq_ref import Scheme, arrays
from nsq_ref.scheme import as_scheme
from tests.support.tensors import BFloat16Tensor, DeviceTensor, OlderTensor, Tensor

INTEGER_DTYPES = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]


def forms(value: int) -> list[Any]:
    """One integer, in every form that it may come in."""
    fits = [d for d in INTEGER_DTYPES if np.iinfo(d).min <= value <= np.iinfo(d).max]
    scalars = [dtype.type(value) for dtype in fits]
    return [value, *scalars, *map(np.array, scalars), *(Tensor(np.array(s)) for s in scalars)]


# --- integers -----------------------------------------------------------------------------------


@given(st.integers(-(2**63), 2**64 - 1))
def test_an_integer_in_every_form(value: int) -> None:
    for form in forms(value):
        taken = arrays.as_integer("n", form)
        assert type(taken) is int
        assert taken == value


@pytest.mark.parametrize(
    "value",
    [
        True, np.True_, np.array(True), Tensor(np.array(True)), 3.0, np.float64(3), np.array(3.0),
        Tensor(np.array(3.0)), "3", b"3", None, [3], np.array([3]), Tensor(np.array([3])), 3 + 0j,
        np.array("3"), np.array(3, object), DeviceTensor(np.array(3)),
    ],
)  # fmt: skip
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^head_dim(=| cannot be read)"):
        arrays.as_integer("head_dim", value)
    with pytest.raises(TypeError, match=r"^lengths(\[1\]=|.*cannot be read)"):
        arrays.as_integers("lengths", [2, value])


def test_an_integer_out_of_range() -> None:
    for form in forms(0):
        with pytest.raises(ValueError, match=r"^n=0 must be an integer of at least 1$"):
            arrays.as_integer("n", form, least=1)
        with pytest.raises(ValueError, match=r"^n=0 must be an integer from 1 to 3$"):
            arrays.as_integer("n", form, 1, 3)
        with pytest.raises(ValueError, match=r"^n=0 must be an integer of at most -1$"):
            arrays.as_integer("n", form, most=-1)
        assert arrays.as_integer("n", form, 0, 0) == 0


@given(st.lists(st.integers(0, 127), max_size=4))
def test_integers_in_every_form(values: list[int]) -> None:
    every = [values, tuple(values), [np.int8(v) for v in values], [np.array(v) for v in values]]
    every += [wrap(np.array(values, d)) for d in INTEGER_DTYPES for wrap in (np.asarray, Tensor)]
    every += [np.array(values[::-1], np.int64)[::-1]]
    for form in every:
        assert arrays.as_integers("rows", form, len(values), 0, 127) == values
        assert arrays.as_integers("rows", form, most=values) == values
    assert arrays.as_integers("rows", range(len(values))) == list(range(len(values)))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (3, TypeError, r"^rows=3 is one integer; give a list, such as \[3\]$"),
        (np.array(3), TypeError, r"^rows=3 is one integer; give a list, such as \[3\]$"),
        (np.int8(3), TypeError, r"^rows=3 is one integer; give a list, such as \[3\]$"),
        (Tensor(np.array(3)), TypeError, r"^rows=3 is one integer; give a list"),
        (np.array([1.0, 2]), TypeError, r"^rows has dtype float64; give integers$"),
        (np.array([True, False]), TypeError, r"^rows has dtype bool; give integers$"),
        (np.array([[1, 2]]), ValueError, r"^rows has shape \[1, 2\]; .* such as np.ravel\(rows\)"),
        (
            np.array([[1, 2]]).view(np.matrix),
            ValueError,
            r"^rows has shape \[1, 2\]; .* such as np.ravel\(rows\)",
        ),
        (np.ma.masked_array([1, 2]), TypeError, r"^rows is a masked array"),
        ("12", TypeError, r"^rows='12' is no list of integers$"),
        (b"12", TypeError, r"^rows=b'12' is no list of integers$"),
        ({1, 2}, TypeError, r"^rows={1, 2} is no list of integers$"),
        (None, TypeError, r"^rows=None is no list of integers$"),
        ([1, 2, 3], ValueError, r"^rows has shape \[3\]; give 2, one a row$"),
        ([1, -1], ValueError, r"^rows\[1\]=-1 must be an integer from 0 to 4$"),
        (np.array([1, 5]), ValueError, r"^rows\[1\]=5 must be an integer from 0 to 4$"),
        ([[1], [2]], TypeError, r"^rows\[0\]=\[1\] is not an integer$"),
        ([np.array([1]), 2], TypeError, r"^rows\[0\]=int64 \[1\] is not an integer; .* rows\[0\]"),
    ],
)
def test_what_is_no_list_of_integers(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        arrays.as_integers("rows", values, 2, 0, 4)


def test_numbers() -> None:
    half = [dtype.type(0.5) for dtype in arrays.INPUT_DTYPES]
    tensors = [Tensor(np.array(0.5)), BFloat16Tensor(np.array(0.5, ml_dtypes.bfloat16))]
    for value in (0.5, *half, *map(np.array, half), *tensors):
        assert arrays.as_float("scale", value) == 0.5
        assert type(arrays.as_float("scale", value)) is float
    for value in forms(3):
        assert arrays.as_float("scale", value) == 3
    for wrong in (True, np.True_, "0.5", None, [0.5], np.array([0.5]), 1j, np.array(1j)):
        with pytest.raises(TypeError, match=r"^scale=.* is not a number"):
            arrays.as_float("scale", wrong)


# --- arrays -------------------------------------------------------------------------------------


def test_subclasses_count_as_the_array_they_hold() -> None:
    x = np.array([[1.0, 2.0], [3.0, 4.0]]).view(np.matrix)
    taken = arrays.as_float_array("x", x)
    assert type(taken) is np.ndarray
    assert np.shares_memory(taken, x)


def test_an_empty_list_is_one_of_integers() -> None:
    assert arrays.as_integer_array("codes", [[], []]).shape == (2, 0)
    with pytest.raises(TypeError, match=r"^codes has dtype float64; give integers$"):
        arrays.as_integer_array("codes", np.zeros((2, 0)))


def test_what_cannot_be_read() -> None:
    with pytest.raises(TypeError, match=r"^x cannot be read as an array \(the tensor lives on"):
        arrays.as_array("x", DeviceTensor(np.ones(2)))
    with pytest.raises(TypeError, match=r"^x has dtype object; give integers"):
        arrays.as_integer_array("x", None)
    with pytest.raises(TypeError, match=r"^x has dtype float64; give integers"):
        arrays.as_integer_array("x", [1.0])
    with pytest.raises(TypeError, match=r"^x has dtype complex128; give real numbers"):
        arrays.as_real_array("x", [1j])


@pytest.mark.parametrize("wrap", [np.asarray, Tensor, OlderTensor])
def test_output_is_written_where_it_is(wrap: Any) -> None:
    mine = np.zeros((2, 3), np.float32)
    view = arrays.as_output("out", wrap(mine), (2, 3), np.float32)
    assert np.shares_memory(view, mine)
    view[...] = 1
    assert (mine == 1).all()


@pytest.mark.parametrize("wrap", [np.asarray, Tensor, OlderTensor])
def test_output_that_cannot_be_written(wrap: Any) -> None:
    locked = np.zeros((2, 3), np.float32)
    locked.flags.writeable = False
    wide = np.zeros((2, 6), np.float32)
    for out, error, message in (
        (locked, (TypeError, ValueError), r"^out (must be C-contiguous and writeable|cannot be)"),
        (wide[:, ::2], ValueError, r"^out must be C-contiguous and writeable; pass np.empty"),
        (wide[:, :3], ValueError, r"^out must be C-contiguous and writeable; pass np.empty"),
        (wide, ValueError, r"^out must be a float32 array of shape \[2, 3\], got float32 \[2, 6\]"),
        (locked.astype(np.float64), ValueError, r"^out must be a float32 array .* got float64"),
    ):
        with pytest.raises(error, match=message):
            arrays.as_output("out", wrap(out), (2, 3), np.float32)
    assert not locked.any()
    assert not wide.any()


def test_output_that_is_no_array() -> None:
    for out in ([[0.0] * 3] * 2, None, bytearray(24), np.float32(0)):
        with pytest.raises((TypeError, ValueError), match=r"^out must be a"):
            arrays.as_output("out", out, (2, 3), np.float32)


# --- schemes ------------------------------------------------------------------------------------


def test_schemes_by_name() -> None:
    assert as_scheme("key", "nsep+pchan4") == as_scheme("key", Scheme()) == Scheme()
    pair = Scheme.named("KIVI-K2V4")
    for scheme, error, message in (
        ("KIVI-K2V4", ValueError, r"^key='KIVI-K2V4' names a pair .* Scheme.named\('KIVI-K2V4'\)"),
        (pair, TypeError, r"^key is a pair for keys and values; pass its \.key or its \.value$"),
        ("nsep5", ValueError, r"^unknown scheme name 'nsep5'"),
        (4, TypeError, r"^key must be a Scheme or a name such as 'nsep\+pchan4', got 4$"),
        (None, TypeError, r"^key must be a Scheme"),
    ):
        with pytest.raises(error, match=message):
            as_scheme("key", scheme)
