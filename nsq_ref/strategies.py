"""Hypothesis strategies: schemes, and keys and values that look for trouble.

They draw what random data hides: ties, zero tokens and channels, signed zeros, subnormals, norms
from 1e-30 to 1e30, outlier channels, head sizes at which packing and proofs change. What is drawn
may be refused by rules N1, M4, S5 and D3, as a norm may be beyond a dtype: expect
`nsq_ref.RangeError`, or fix schemes with ``scale_dtype`` and ``norm_dtype`` of float32.

A property of an encoder of your own::

    @given(strategies.inputs(), strategies.schemes(bits=4))
    def test_mine(x, scheme):
        try:
            expected = nsq.quantize(x, scheme)
        except nsq.RangeError:
            assume(False)
        assert mine(x, scheme) == expected.packed.tobytes()

It needs hypothesis: ``pip install hypothesis``, or ``pip install 'nsq-ref[test]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from nsq_ref.arrays import as_integer, as_integers
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.feedback import Feedback
from nsq_ref.scheme import FloatName, Scheme

try:
    import hypothesis.strategies as st
except ImportError as error:
    raise ImportError(
        "nsq_ref.strategies needs hypothesis; install it with `pip install hypothesis`, or with "
        "`pip install 'nsq-ref[test]'`"
    ) from error

__all__ = [
    "AWKWARD", "DTYPES", "FEEDBACK_KINDS", "KINDS", "feedbacks", "inputs", "schemes", "tensors",
]  # fmt: skip

DtypeName = FloatName | Literal["float64"]
Kind = Literal["normal", "awkward", "ties", "integers", "one-sided", "constant", "huge"]
FeedbackKind = Literal[
    "identity", "queries", "few queries", "one-hot queries", "heavy tails", "ties", "wild"
]

FEEDBACK_KINDS: tuple[FeedbackKind, ...] = get_args(FeedbackKind)
DTYPES: tuple[DtypeName, ...] = ("float32", "float16", "bfloat16", "float64")  # rule I1
KINDS: tuple[Kind, ...] = get_args(Kind)

# Neighbours of a tie, subnormals of float16 and float32, the ends of both ranges, signed zeros.
AWKWARD: tuple[float, ...] = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, 3.5, -0.5, -2.5, 7.0, -7.0, 8.0, 15.0,
    float(np.nextafter(np.float32(0.5), np.float32(1))),
    float(np.nextafter(np.float32(2.5), np.float32(0))),
    2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-126, 2.0**-149, 1e-30, 1e30, 65504.0, 65520.0,
    2e38, 3e38,
)  # fmt: skip

# Whole and broken bytes of every width (P1), head sizes of models, the bound of collapse (D2).
_TELLING_HEAD_DIMS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 96, 128, 195, 196, 197, 256)
_LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 3.4e38}


def schemes(**fixed: Any) -> st.SearchStrategy[Scheme]:
    """Draw any scheme of NSQ-1.

    Parameters
    ----------
    **fixed
        Fields of `Scheme` that are not drawn freely: a value, or a strategy for it. ``norm_rule``,
        ``magnitude`` and ``norm_dtype`` hold where norms are separated, and a balanced norm with
        axis channel and a gain; they mean nothing elsewhere.

    Raises
    ------
    TypeError
        For a name that is no field of `Scheme`.

    Examples
    --------
    >>> from hypothesis import find, settings, strategies as st
    >>> quick = settings(database=None)
    >>> few = schemes(bits=st.sampled_from([2, 3]), separate_norm=False)
    >>> scheme = find(few, lambda scheme: scheme.axis == "token", settings=quick)
    >>> scheme.bits in (2, 3), scheme.separate_norm, scheme.axis
    (True, False, 'token')
    """
    drawn = _fields()
    unknown = sorted(set(fixed) - set(drawn))
    if unknown:
        raise TypeError(f"a scheme has no {', '.join(unknown)}; its fields are {', '.join(drawn)}")
    for name, value in fixed.items():
        drawn[name] = value if isinstance(value, st.SearchStrategy) else st.just(value)
    return _schemes(drawn)


def tensors(
    *,
    min_tokens: int = 1,
    max_tokens: int = 7,
    min_head_dim: int = 1,
    max_head_dim: int = 9,
    leading: Sequence[int] | None = None,
    dtypes: Sequence[DtypeName] = ("float32",),
    kinds: Sequence[Kind] = KINDS,
    finite: bool = True,
) -> st.SearchStrategy[Array]:
    """Draw keys or values ``x[..., T, D]``.

    Parameters
    ----------
    min_tokens, max_tokens, min_head_dim, max_head_dim : int
        Bounds of T and D, drawn with a liking for the ends and for D at which something changes.
    leading : sequence of int, optional
        The axes before T and D; one axis of 1 or 2 by default.
    dtypes : sequence of {"float16", "bfloat16", "float32", "float64"}
        The dtype is one of these; what it does not hold is clipped.
    kinds : sequence of str
        What the numbers are like before tokens are scaled and tokens and channels set to 0:

        ``normal``
            Random.
        ``awkward``
            Few values of `AWKWARD`, over and over.
        ``ties``
            Multiples of 1/2 under a scale of 1 in 4 bits, without norm separation (Q1).
        ``integers``
            Multiples of 1/2 up to 15 / 2.
        ``one-sided``
            All above or below 0, or nearly so (S2).
        ``constant``
            All tokens alike.
        ``huge``
            Norms or ranges at the end of float32 (N1, D3).
    finite : bool
        If false, at least one element is NaN or infinite: the array must be refused (I2).

    Raises
    ------
    TypeError, ValueError
        For what is no integer, for bounds in the wrong order, and for an unknown dtype or kind.

    Examples
    --------
    >>> from hypothesis import find, settings
    >>> quick = settings(database=None)
    >>> x = find(tensors(max_head_dim=64, leading=()), lambda x: x.shape[1] > 60, settings=quick)
    >>> x.ndim, x.dtype.name, bool(np.isfinite(x).all())
    (2, 'float32', True)
    >>> bool(np.isfinite(find(tensors(finite=False), lambda x: True, settings=quick)).all())
    False
    """
    min_tokens, max_tokens = _bounds("tokens", min_tokens, max_tokens)
    min_head_dim, max_head_dim = _bounds("head_dim", min_head_dim, max_head_dim)
    lead = None if leading is None else tuple(as_integers("leading", leading, least=1))
    for name, given, allowed in (("dtypes", dtypes, DTYPES), ("kinds", kinds, KINDS)):
        if isinstance(given, str) or not given or not set(given) <= set(allowed):
            raise ValueError(f"{name}={given!r} must be a sequence of some of {', '.join(allowed)}")
    telling = [n for n in _TELLING_HEAD_DIMS if min_head_dim <= n <= max_head_dim]
    head_dims = st.sampled_from(sorted({min_head_dim, *telling, max_head_dim}))
    return _tensors(
        st.integers(1, 2).map(lambda heads: (heads,)) if lead is None else st.just(lead),
        st.one_of(st.integers(min_tokens, max_tokens), st.just(max_tokens)),
        st.one_of(head_dims, st.integers(min_head_dim, max_head_dim)),
        st.sampled_from(list(kinds)),
        st.sampled_from(list(dtypes)),
        finite,
    )


def inputs(**options: Any) -> st.SearchStrategy[Array]:
    """Draw `tensors` of every dtype that is taken (rule I1).

    Parameters
    ----------
    **options
        Those of `tensors`, but dtypes.

    Examples
    --------
    >>> from hypothesis import find, settings
    >>> x = find(inputs(), lambda x: x.itemsize == 2, settings=settings(database=None))
    >>> x.dtype.name
    'float16'
    """
    return tensors(dtypes=DTYPES, **options)


def feedbacks(
    kv_heads: int, head_dim: int, *, kinds: Sequence[FeedbackKind] = FEEDBACK_KINDS
) -> st.SearchStrategy[Feedback]:
    """Draw feedback for keys (F1).

    Parameters
    ----------
    kv_heads, head_dim : int
    kinds : sequence of str
        What it is made of:

        ``identity``
            No error moves, and all weigh the same.
        ``queries``, ``few queries``, ``one-hot queries``, ``heavy tails``
            Queries, as many as channels and more; fewer than channels; each of one channel;
            with channels of 1000 times the size of others.
        ``ties``
            Any order, and multiples of 1/4: what moves leaves ties where ties were. Weights are
            powers of two.
        ``wild``
            Any order, any finite factor and any weights down to the least float32, so that much is
            clamped and float32 is left.

    Raises
    ------
    TypeError, ValueError
        For what is no integer, and for an unknown kind.

    Examples
    --------
    >>> from hypothesis import find, settings
    >>> find(feedbacks(2, 8), lambda feedback: True, settings=settings(database=None))
    Feedback(kv_heads=2, head_dim=8)
    """
    kv_heads = as_integer("kv_heads", kv_heads, least=1)
    head_dim = as_integer("head_dim", head_dim, least=1)
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(FEEDBACK_KINDS):
        raise ValueError(
            f"kinds={kinds!r} must be a sequence of some of {', '.join(FEEDBACK_KINDS)}"
        )
    return _feedbacks(kv_heads, head_dim, st.sampled_from(list(kinds)))


def _bounds(name: str, least: Any, most: Any) -> tuple[int, int]:
    low, high = as_integer(f"min_{name}", least), as_integer(f"max_{name}", most)
    if not 1 <= low <= high:
        raise ValueError(f"min_{name}={low} and max_{name}={high} must be ordered, and at least 1")
    return low, high


def _fields() -> dict[str, st.SearchStrategy[Any]]:
    return {
        "bits": st.sampled_from([4, 2, 3, 8]),
        "separate_norm": st.booleans(),
        "axis": st.sampled_from(["channel", "token"]),
        "symmetric": st.booleans(),
        "scale_rule": st.sampled_from(["range", "search"]),
        "norm_rule": st.sampled_from(["plain", "balanced"]),
        "magnitude": st.sampled_from(["norm", "gain", "lsq"]),
        "block_size": st.sampled_from([None, 1, 2, 3, 5]),
        "sink_tokens": st.sampled_from([0, 1, 3]),
        "outlier_channels": st.sampled_from([0, 1, 4]),
        "scale_dtype": st.sampled_from(list(FLOAT_DTYPES)),
        "norm_dtype": st.sampled_from(list(FLOAT_DTYPES)),
    }


@st.composite
def _schemes(draw: st.DrawFn, fields: dict[str, st.SearchStrategy[Any]]) -> Scheme:
    chosen = {name: draw(field) for name, field in fields.items()}
    if not chosen["separate_norm"]:
        chosen.update(norm_rule="plain", magnitude="norm", norm_dtype="float16")
    if chosen["axis"] == "token" or chosen["magnitude"] == "norm":
        chosen["norm_rule"] = "plain"
    return Scheme(**chosen)


@st.composite
def _tensors(
    draw: st.DrawFn, leadings: st.SearchStrategy[tuple[int, ...]],
    tokens_counts: st.SearchStrategy[int], head_dims: st.SearchStrategy[int],
    kinds: st.SearchStrategy[Kind], dtypes: st.SearchStrategy[DtypeName], finite: bool,
) -> Array:  # fmt: skip
    leading, tokens, head_dim = draw(leadings), draw(tokens_counts), draw(head_dims)
    shape = (*leading, tokens, head_dim)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(kinds)
    if kind == "normal":
        x = rng.standard_normal(shape)
    elif kind == "awkward":
        x = np.array(draw(st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=12)))
        x = np.resize(x, shape)
    elif kind == "ties":
        x = rng.integers(-14, 15, shape) / 2
        x[..., 0, :] = 7.0  # 7 / 7, whichever axis the scale has
        x[..., 0] = 7.0
    elif kind == "integers":
        x = rng.integers(-15, 16, shape) / 2
    elif kind == "one-sided":
        x = rng.random(shape) + draw(st.sampled_from([0.0, 3.0, -4.0]))
    elif kind == "huge":  # one such token has a norm, or its scales a range, beyond float32
        x = rng.choice([1.0, -1e30, 1.5e38, -2e38, 3.4e38], shape)
    else:
        x = np.broadcast_to(rng.standard_normal((*leading, 1, head_dim)), shape).copy()
    if kind != "ties" and draw(st.booleans()):  # outlier channels of 10 to 1000 times
        x[..., rng.integers(head_dim)] *= 10.0 ** draw(st.integers(1, 3))
    spread = draw(st.sampled_from([0, 1, 4, 30]))
    if spread and kind not in ("awkward", "ties"):  # norms from 1e-30 to 1e30
        x = x * 10.0 ** rng.uniform(-spread, spread, (*leading, tokens, 1))
    if draw(st.booleans()):
        x[..., rng.integers(tokens), :] = draw(st.sampled_from([0.0, -0.0]))
    if draw(st.booleans()):
        x[..., rng.integers(head_dim)] = 0.0
    dtype = draw(dtypes)
    x = np.clip(x, -_LARGEST[dtype], _LARGEST[dtype])
    if not finite:
        places = draw(st.lists(st.integers(0, x.size - 1), min_size=1, max_size=3))
        x.ravel()[places] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    return x if dtype == "float64" else x.astype(np.float32).astype(FLOAT_DTYPES[dtype])


@st.composite
def _feedbacks(
    draw: st.DrawFn, kv_heads: int, head_dim: int, kinds: st.SearchStrategy[FeedbackKind]
) -> Feedback:
    rng, kind = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(kinds)
    shape = (kv_heads, head_dim, head_dim)
    if kind in ("identity", "ties", "wild"):
        order = np.stack([rng.permutation(head_dim) for _ in range(kv_heads)])
        factor, halvings = np.zeros(shape), np.zeros((kv_heads, head_dim))
        if kind == "ties":
            factor = rng.integers(-6, 7, shape) / 4
            halvings += rng.integers(0, draw(st.sampled_from([1, 4, 21])), halvings.shape)
        elif kind == "wild":
            halvings = rng.uniform(0, draw(st.sampled_from([0, 20, 149])), halvings.shape)
            factor = rng.standard_normal(shape) * 10.0 ** rng.uniform(-30, 38, shape)
            factor[rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9]))] = 0
            factor = np.clip(factor, -3e38, 3e38)
        weights = 2.0 ** (halvings.min(axis=1, keepdims=True) - halvings)  # the largest is 1
        factor = np.triu(factor, 1) + weights[:, None] * np.eye(head_dim)
        return Feedback(order.astype(np.int32), factor.astype(np.float32))
    count = max(head_dim // 3, 1) if kind == "few queries" else 2 * head_dim + 3
    queries = rng.standard_normal((kv_heads, count, head_dim))
    if kind == "one-hot queries":
        queries = np.eye(head_dim)[rng.integers(head_dim, size=(kv_heads, count))]
    else:
        queries = queries @ rng.standard_normal(shape)
        if kind == "heavy tails":
            queries *= 1000.0 ** rng.integers(0, 2, head_dim)
    return Feedback.from_queries(queries, kv_heads, draw(st.sampled_from([0.01, 0.1])))
