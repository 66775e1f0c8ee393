"""Arrays, integers and numbers of others: taken, or refused by the argument's name.

Every public function reads its arguments here, so that all of them take the same: NumPy, whatever
speaks DLPack on the CPU (torch, JAX), and lists. Subclasses of NumPy's array, ``np.matrix`` among
them, count as the plain array that they hold; masked arrays are refused, as the mask would be lost.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref import dlpack
from nsq_ref.dtypes import INPUT_DTYPES, Array, Float32, Float64

# Work goes slab by slab so that what is needed besides input and output stays small.
SLAB_BYTES = 1 << 26


class RangeError(ValueError):
    """A value that the chosen dtype, or float32 itself, cannot hold (rules N1, M4, S5, D3).

    Parameters
    ----------
    message : str
    part : str
        What cannot be held: a token's ``norm``, ``gain`` or ``lsq``, as the scheme says; ``scale``,
        ``zero`` or ``outliers``; or ``x`` itself.
    index : sequence of int
        Where: for a token's factor the token in x, otherwise the place in that part.
    fault : str
        What is wrong with it, and the remedy: the message without the place.
    """

    def __init__(
        self, message: str, part: str = "", index: Sequence[int] = (), fault: str = ""
    ) -> None:
        super().__init__(message)
        self.part, self.index, self.fault = part, tuple(index), fault


# --- arrays -------------------------------------------------------------------------------------


def as_array(name: str, x: Any) -> Array:
    """Take any array, bfloat16 tensors among them, as NumPy's, if possible without a copy.

    Raises TypeError for masked arrays, and for what cannot be read as an array.

    Examples
    --------
    >>> as_array("x", [1, 2])
    array([1, 2])
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array and masks are not supported; pass {name}.filled(0)"
        )
    reasons = []
    readers: list[Callable[[Any], Array]] = [np.asarray]
    if not isinstance(x, np.ndarray) and hasattr(x, "__dlpack__"):
        readers = [np.from_dlpack, dlpack.bfloat16, np.asarray]
    for reader in readers:
        try:
            array = reader(x)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            reasons.append(str(error))
            continue
        if not reasons or array.dtype != object:  # NumPy wraps in one what it cannot read
            return array
    raise TypeError(
        f"{name} cannot be read as an array ({reasons[-1]}); pass a NumPy array, or a tensor on "
        "the CPU that needs no gradient"
    )


def as_float_array(name: str, x: Any) -> Array:
    """Take any array of a supported dtype as NumPy's, if possible without a copy (I1).

    Examples
    --------
    >>> as_float_array("x", [0.5, 2])
    array([0.5, 2. ])
    """
    given = as_array(name, x)
    if given.dtype in INPUT_DTYPES:
        return given
    native = given.dtype.newbyteorder("=")
    if native not in INPUT_DTYPES:
        raise TypeError(
            f"{name} has dtype {given.dtype}; pass float32, float16, bfloat16 (ml_dtypes) or "
            f"float64, for example {name}.astype(np.float32)"
        )
    return given.astype(native)


def as_real_array(name: str, values: Any) -> Float64:
    """Take an array of real numbers, integers among them, as float64.

    Examples
    --------
    >>> as_real_array("x", [1, 2])
    array([1., 2.])
    """
    given = as_array(name, values)
    # bfloat16 comes from ml_dtypes; NumPy knows it as raw bytes.
    if given.dtype.kind not in "fiu" and given.dtype not in INPUT_DTYPES:
        raise TypeError(f"{name} has dtype {given.dtype}; give real numbers")
    return given.astype(np.float64, copy=False)


def as_integer_array(name: str, values: Any) -> Array:
    """Take an array of integers, of whatever shape and width.

    Examples
    --------
    >>> as_integer_array("codes", [[1, -7]])
    array([[ 1, -7]])
    """
    given = as_array(name, values)
    if not given.size and isinstance(values, list | tuple):  # which NumPy makes floats of
        given = given.astype(np.int64)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {given.dtype}; give integers")
    return given


def require(name: str, values: Array, holds: Array, what: str) -> None:
    """Refuse the first value that is not as it must be, in array order; ``what`` follows it.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([1, np.nan])
    >>> require("x", x, np.isfinite(x), ", which is not finite")
    Traceback (most recent call last):
    ValueError: x[1] is nan, which is not finite
    """
    if not holds.all():
        index = [int(i) for i in np.argwhere(~holds)[0]]
        where = f"{name}{index}" if index else name
        raise ValueError(f"{where} is {values[tuple(index)]}{what}")


def as_output(name: str, out: Any, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return an array of NumPy's that writes into ``out``, without a copy.

    Takes what is writeable, C-contiguous, and of this shape and dtype; any array that speaks DLPack
    may be.

    Examples
    --------
    >>> import numpy as np
    >>> mine = np.empty((2, 3), np.float32)
    >>> np.shares_memory(as_output("out", mine, (2, 3), np.float32), mine)
    True
    """
    dtype = np.dtype(dtype)
    wanted = f"pass np.empty({list(shape)}, np.{dtype})"
    if not (isinstance(out, np.ndarray) or hasattr(out, "__dlpack__")):
        raise TypeError(f"{name} must be an array, got {type(out).__name__}; {wanted}")
    view = as_array(name, out)
    if not view.flags.writeable and not isinstance(out, np.ndarray):
        view = dlpack.writeable(out, view)
    if (view.dtype, view.shape) != (dtype, shape):
        raise ValueError(
            f"{name} must be a {dtype} array of shape {list(shape)}, got {view.dtype} "
            f"{list(view.shape)}"
        )
    if not (view.flags.c_contiguous and view.flags.writeable):
        raise ValueError(f"{name} must be C-contiguous and writeable; {wanted}")
    return view


# --- integers and numbers -----------------------------------------------------------------------


def as_integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Take one integer: Python's, NumPy's, a 0-d array or tensor, whatever has ``__index__``.

    Sizes, counts and positions of every public function come through here.

    Raises
    ------
    TypeError
        For bool, for floats even if they are whole, for strings, and for more than one integer.
    ValueError
        Outside ``least`` to ``most``.

    Examples
    --------
    >>> import numpy as np
    >>> as_integer("head_dim", np.array(64), least=1)
    64
    """
    integer = value if type(value) is int else _index(name, value)
    if integer is None:
        raise TypeError(f"{name}={_described(name, value)} is not an integer{_remedy(name, value)}")
    if (least is not None and integer < least) or (most is not None and integer > most):
        raise ValueError(f"{name}={integer} must be an integer {_range(least, most)}")
    return integer


def as_integers(
    name: str, values: Any, count: int | None = None, least: int | None = None,
    most: int | Sequence[int] | None = None,
) -> list[int]:  # fmt: skip
    """Take a list of integers: a sequence of what `as_integer` takes, a 1-d array or tensor.

    ``count`` says how many there must be, ``least`` and ``most`` bound all of them; a sequence of
    ``most`` bounds each. TypeError for what is no sequence and, by index, for what is no integer;
    ValueError for another shape and, by index, for a value out of range.

    Examples
    --------
    >>> import numpy as np
    >>> as_integers("lengths", np.array([3, 1]), count=2, least=0, most=3)
    [3, 1]
    """
    if _is_array(values):
        given = as_array(name, values)
        if given.ndim == 0 and given.dtype.kind in "iu":
            raise TypeError(f"{name}={given} is one integer; give a list, such as [{given}]")
        if given.dtype.kind not in "iu":
            raise TypeError(f"{name} has dtype {given.dtype}; give integers")
        if given.ndim != 1:
            raise ValueError(
                f"{name} has shape {list(given.shape)}; give a list of integers, or an array of "
                f"one axis, such as np.ravel({name})"
            )
        values = given.tolist()
    elif _index(name, values) is not None:
        raise TypeError(f"{name}={values} is one integer; give a list, such as [{values}]")
    elif isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(f"{name}={_described(name, values)} is no list of integers")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} has shape [{len(values)}]; give {count}, one a row")
    limits = most if isinstance(most, Sequence) else [most] * len(values)
    return [
        as_integer(f"{name}[{i}]", value, least, limit)
        for i, (value, limit) in enumerate(zip(values, limits, strict=True))
    ]


def as_float(name: str, value: Any) -> float:
    """Take one real number: Python's, NumPy's, a 0-d array or tensor.

    Raises TypeError for bool, for strings, and for more than one number.

    Examples
    --------
    >>> import numpy as np
    >>> as_float("scale", np.float32(0.125))
    0.125
    """
    given = as_array(name, value) if _is_array(value) else value
    if isinstance(given, np.ndarray) and given.ndim == 0:
        if given.dtype.kind in "fiu" or given.dtype in INPUT_DTYPES:
            return float(given)
    elif isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    raise TypeError(f"{name}={_described(name, value)} is not a number{_remedy(name, value)}")


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__") or hasattr(value, "__array__")


def _index(name: str, value: Any) -> int | None:
    """Return the integer that a value is, or None."""
    if isinstance(value, bool):
        return None
    if _is_array(value):
        given = as_array(name, value)
        return int(given) if given.ndim == 0 and given.dtype.kind in "iu" else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _described(name: str, value: Any) -> str:
    if _is_array(value) and not isinstance(value, np.generic):
        given = as_array(name, value)
        return f"{given}" if given.ndim == 0 else f"{given.dtype} {list(given.shape)}"
    return f"{value!r:.80}"


def _remedy(name: str, value: Any) -> str:
    several = _is_array(value) and as_array(name, value).ndim > 0
    return f"; give one of them, such as {name}[0]" if several else ""


def _range(least: int | None, most: int | None) -> str:
    if most is None:
        return f"of at least {least}"
    return f"of at most {most}" if least is None else f"from {least} to {most}"


# --- tokens -------------------------------------------------------------------------------------


def slabs(x: Array) -> Iterator[tuple[slice, Float32]]:
    """Cut ``x[..., T, D]`` into runs of whole sequences, C-contiguous float32 ``[n, T, D]``.

    Examples
    --------
    >>> import numpy as np
    >>> [(leads, slab.shape) for leads, slab in slabs(np.zeros((2, 3, 4, 8)))]
    [(slice(0, 6, None), (6, 4, 8))]
    """
    count, (tokens, head_dim) = math.prod(x.shape[:-2]), x.shape[-2:]
    step = max(1, SLAB_BYTES // (4 * tokens * head_dim))
    flat = x.reshape(count, tokens, head_dim) if x.flags.c_contiguous else None
    for start in range(0, count, step):
        leads = slice(start, min(start + step, count))
        if flat is not None:
            part = flat[leads]
        else:
            indices = (
                zip(*np.unravel_index(range(leads.start, leads.stop), x.shape[:-2]), strict=True)
                if x.ndim > 2
                else [()]
            )
            part = np.stack([x[index] for index in indices])
        with np.errstate(over="ignore"):
            yield leads, np.ascontiguousarray(part, np.float32)


def not_finite(name: str, x: Array) -> ValueError:
    """Return the error that names the first value that is not finite, in array order (I2).

    Examples
    --------
    >>> import numpy as np
    >>> str(not_finite("x", np.float32([[0, np.nan]])))[:16]
    'x[0, 1] is nan; '
    """
    for leads, slab in slabs(x):
        found = np.argwhere(~np.isfinite(slab))
        if len(found):
            n, t, j = (int(i) for i in found[0])
            lead = np.unravel_index(leads.start + n, x.shape[:-2]) if x.ndim > 2 else ()
            index = [*map(int, lead), t, j]
            value = x[tuple(index)]
            if np.isfinite(value):
                return RangeError(f"{name}{index} is {value}, beyond float32; scale {name} down")
            return ValueError(
                f"{name}{index} is {value}; nothing was quantized. Mask padding and mend the "
                "values first: one such value would spoil the scales of its whole block"
            )
    raise RuntimeError("a kernel reported a value that is not finite, but there is none")
