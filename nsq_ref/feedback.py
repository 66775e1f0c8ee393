"""Key feedback (rule F1): which way errors of keys may go, learned from the queries that meet them.

An error e of a key matters only through the products with queries. With H the second moment of the
queries that share a key head, the expected square of such a product is ``e^T H e``. Codes are made
one channel after the other, and the error of each is moved into the channels not yet coded, by
rows of F: the triangular factor of the inverse of H, its rows divided by their diagonal. What is
left of an error then counts by the inverse of that diagonal, which F has in its place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref.arrays import as_float, as_float_array, as_integer, as_integer_array, require
from nsq_ref.dtypes import Float32, Float64
from nsq_ref.environment import in_default_environment

__all__ = ["Feedback", "HeadFeedback", "Moments", "second_moment"]

DAMPING = 0.03
ASYMMETRY = 1e-6  # of the largest element: more is no rounding


class HeadFeedback(NamedTuple):
    """What rule F1 takes for one key/value head.

    Nothing of this library writes to one, so that threads may share it.
    """

    order: npt.NDArray[np.int32]  # [D], channels in the order in which they are coded
    factor: Float32  # [D, D], both axes in that order


@dataclass(frozen=True, eq=False)
class Feedback:
    """Order and factor of each key/value head, as rule F1 takes them.

    They belong to one layer of one model. Nothing changes one, so that threads may share it.

    Parameters
    ----------
    order : int array, shape [kv_heads, D]
        Channels in the order in which they are coded: a permutation for each head.
    factor : array, shape [kv_heads, D, D]
        Row p says what an error of 1 in channel ``order[p]`` takes away from the channels that are
        coded after it, column r being channel ``order[r]``, and ``factor[p, p]``, above 0 and at
        most 1, how much an error that is left in channel ``order[p]`` weighs. 0 below the diagonal.
        Kept as float32.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, an order that is no permutation, and a factor that is not
        finite, has another diagonal, or is not 0 below it.

    Examples
    --------
    >>> import numpy as np
    >>> queries = np.random.default_rng(0).standard_normal((9, 512, 64)) * np.linspace(1, 2, 64)
    >>> feedback = Feedback.from_queries(queries, kv_heads=3)
    >>> feedback
    Feedback(kv_heads=3, head_dim=64)
    >>> feedback.order.mean(axis=1).tolist(), bool((feedback.order[:, 0] > 32).all())
    ([31.5, 31.5, 31.5], True)
    """

    order: npt.NDArray[np.int32]
    factor: Float32

    def __post_init__(self) -> None:
        order = as_integer_array("order", self.order)
        factor = as_float_array("factor", self.factor)
        if order.ndim != 2 or 0 in order.shape:
            raise ValueError(f"order has shape {list(order.shape)}; give [kv_heads, head_dim]")
        kv_heads, head_dim = order.shape
        if factor.shape != (kv_heads, head_dim, head_dim):
            raise ValueError(
                f"factor has shape {list(factor.shape)}; with this order it is "
                f"[{kv_heads}, {head_dim}, {head_dim}]"
            )
        with np.errstate(over="ignore"):
            factor = factor.astype(np.float32)
        for head in range(kv_heads):
            if not np.array_equal(np.sort(order[head]), np.arange(head_dim)):
                raise ValueError(
                    f"order[{head}] is no permutation of the channels 0 to {head_dim - 1}"
                )
        diagonal = np.eye(head_dim, dtype=bool)
        weighs = (factor > 0) & (factor <= 1)
        holds = np.where(diagonal, weighs, np.isfinite(factor) & ~np.tril(factor != 0))
        require(
            "factor", factor, holds,
            "; a factor is finite, above 0 and at most 1 on the diagonal, and 0 below it",
        )  # fmt: skip
        for name, array, dtype in (("order", order, np.int32), ("factor", factor, np.float32)):
            own = np.array(array, dtype, order="C")
            own.setflags(write=False)
            object.__setattr__(self, name, own)

    def __reduce__(self) -> tuple[Any, ...]:
        return Feedback, (self.order, self.factor)  # read-only again

    def __deepcopy__(self, memo: object) -> Feedback:
        return self  # nothing changes it

    def __repr__(self) -> str:
        return f"Feedback(kv_heads={self.kv_heads}, head_dim={self.head_dim})"

    @classmethod
    @in_default_environment
    def from_moment(cls, moment: Any, damping: Any = DAMPING) -> Feedback:
        """Make the feedback of a second moment, in float64.

        Channels are coded by falling diagonal of the moment, of equals the lower channel first.
        Scaling a moment changes nothing.

        Parameters
        ----------
        moment : array, shape [kv_heads, D, D]
            As `second_moment` returns it; those of several texts may be added.
        damping : float
            This much of the mean of its diagonal is added to the diagonal. Feedback from one text
            serves another the better for it.

        Returns
        -------
        Feedback

        Raises
        ------
        TypeError, ValueError
            For another shape, what is not finite or not symmetric, a moment of no queries, and one
            that with this damping is not positive definite.

        Examples
        --------
        >>> import numpy as np
        >>> Feedback.from_moment(np.float64([[[1, 1], [1, 5]]]), damping=0).factor
        array([[[ 1. , -1. ],
                [ 0. ,  0.5]]], dtype=float32)
        """
        moment = _moment("moment", moment)
        damping = as_float("damping", damping)
        if not 0 <= damping < np.inf:
            raise ValueError(f"damping={damping} must be a finite number of at least 0")
        orders, factors = zip(
            *(_order_and_factor(head, one, damping) for head, one in enumerate(moment)),
            strict=True,
        )
        return cls(np.stack(orders), np.stack(factors))

    @classmethod
    def from_queries(cls, queries: Any, kv_heads: Any, damping: Any = DAMPING) -> Feedback:
        """Make the feedback of queries: `from_moment` of their `second_moment`.

        Parameters
        ----------
        queries : array, shape [..., heads, T, D]
            As they meet the keys: after the rotary embedding. They need not be scaled.
        kv_heads : int
            Key/value heads, each of which ``heads / kv_heads`` query heads in turn share (A1).
        damping : float
            As in `from_moment`.

        Returns
        -------
        Feedback

        Raises
        ------
        TypeError, ValueError
            As `second_moment` and `from_moment`.

        Examples
        --------
        >>> import numpy as np
        >>> Feedback.from_queries(np.eye(4)[None], kv_heads=1).order
        array([[0, 1, 2, 3]], dtype=int32)
        """
        return cls.from_moment(second_moment(queries, kv_heads), damping)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return int(self.order.shape[0])

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return int(self.order.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of order and factor: what a cache that was coded with it is known by.

        Examples
        --------
        >>> import numpy as np
        >>> len(Feedback.from_queries(np.eye(4)[None], kv_heads=1).digest)
        64
        """
        digest = hashlib.sha256(f"nsq-feedback {list(self.order.shape)}".encode())
        digest.update(self.order.astype("<i4").tobytes())
        digest.update(self.factor.astype("<f4").tobytes())
        return digest.hexdigest()

    def head(self, index: int) -> HeadFeedback:
        """Return what rule F1 takes for one key/value head.

        Examples
        --------
        >>> import numpy as np
        >>> Feedback.from_queries(np.eye(4)[None], kv_heads=1).head(0).factor.shape
        (4, 4)
        """
        index = as_integer("index", index, least=0, most=self.kv_heads - 1)
        return HeadFeedback(self.order[index], self.factor[index])


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the queries of a model, layer by layer.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    layers : mapping of int to array, shape [kv_heads, D, D]
        As `second_moment` returns them, by the number of the layer. Kept as float64.

    Raises
    ------
    TypeError, ValueError
        For what is no mapping from numbers of layers, and for other dtypes and shapes.

    Examples
    --------
    Those of two texts, added up:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> texts = rng.standard_normal((2, 4, 100, 16))  # queries of 4 heads, for 2 of keys
    >>> one, other = (Moments({0: second_moment(queries, kv_heads=2)}) for queries in texts)
    >>> (one + other).feedback()
    {'0': Feedback(kv_heads=2, head_dim=16)}
    """

    layers: Mapping[int, Float64]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            got = type(self.layers).__name__
            raise TypeError(f"layers must map numbers of layers to moments, got {got}")
        own = {}
        for number, given in self.layers.items():
            layer = as_integer("a layer of layers", number, least=0)
            own[layer] = _moment(f"layers[{layer}]", given)
            own[layer].setflags(write=False)
        object.__setattr__(self, "layers", own)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both texts; a layer that one does not have is the other's.

        Raises
        ------
        ValueError
            For layers of other heads.
        """
        if not isinstance(other, Moments):
            return NotImplemented
        layers = dict(self.layers)
        for layer, moment in other.layers.items():
            mine = layers.get(layer)
            if mine is not None and mine.shape != moment.shape:
                raise ValueError(
                    f"layer {layer} has moments of shapes {list(mine.shape)} and "
                    f"{list(moment.shape)}; add those of one model"
                )
            layers[layer] = moment if mine is None else mine + moment
        return Moments(layers)

    def feedback(self, damping: Any = DAMPING) -> dict[str, Feedback]:
        """Return the feedback of every layer, as `nsq_ref.files.save_feedback` takes it.

        Parameters
        ----------
        damping : float
            As `Feedback.from_moment` takes it.

        Raises
        ------
        TypeError, ValueError
            As `Feedback.from_moment`, with the layer.
        """
        made = {}
        for layer, moment in self.layers.items():
            try:
                made[str(layer)] = Feedback.from_moment(moment, damping)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from error
        return made


@in_default_environment
def second_moment(queries: Any, kv_heads: Any) -> Float64:
    """Sum ``q q^T`` over the queries that meet each key/value head.

    Sums of several texts, or of parts of one, may be added: the sum is the moment of all of them.

    Parameters
    ----------
    queries : array, shape [..., heads, T, D]
        As they meet the keys: after the rotary embedding. They need not be scaled.
    kv_heads : int
        Key/value heads, each of which ``heads / kv_heads`` query heads in turn share (A1).

    Returns
    -------
    float64 array, shape [kv_heads, D, D]

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, heads that are no multiple of ``kv_heads``, and NaN or
        infinity.

    Examples
    --------
    >>> import numpy as np
    >>> second_moment(np.float32([[[1, 2]], [[0, 3]]]), kv_heads=1)
    array([[[ 1.,  2.],
            [ 2., 13.]]])
    """
    queries, kv_heads = as_float_array("queries", queries), as_integer("kv_heads", kv_heads, 1)
    if queries.ndim < 3 or queries.shape[-1] == 0:
        raise ValueError(
            f"queries has shape {list(queries.shape)}; give [..., heads, tokens, head_dim]"
        )
    *lead, heads, tokens, head_dim = queries.shape
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"queries has {heads} heads, which is no multiple of kv_heads={kv_heads}")
    require("queries", queries, np.isfinite(queries), "; leave padding out")
    group = heads // kv_heads
    moment = np.zeros((kv_heads, head_dim, head_dim))
    for part in queries.reshape(math.prod(lead), kv_heads, group * tokens, head_dim):
        wide = part.astype(np.float64)
        moment += wide.swapaxes(-1, -2) @ wide
    return moment


def _moment(name: str, given: Any) -> Float64:
    """Take an array ``[kv_heads, D, D]``; a copy."""
    moment = as_float_array(name, given).astype(np.float64)
    if moment.ndim != 3 or 0 in moment.shape or moment.shape[1] != moment.shape[2]:
        raise ValueError(
            f"{name} has shape {list(moment.shape)}; give [kv_heads, head_dim, head_dim]"
        )
    require(name, moment, np.isfinite(moment), "; a moment is finite")
    return moment


def _order_and_factor(
    head: int, moment: Float64, damping: float
) -> tuple[npt.NDArray[np.int32], Float32]:
    """Order and factor of one head."""
    where = f"moment[{head}]"
    if np.abs(moment - moment.T).max() > ASYMMETRY * np.abs(moment).max():
        raise ValueError(f"{where} is not symmetric; give sums of q q^T, as second_moment does")
    diagonal = np.diag(moment)
    with np.errstate(over="ignore"):
        mean = float(np.mean(diagonal))
    if not 0 < mean < np.inf:
        raise ValueError(
            f"the diagonal of {where} has the mean {mean}; that of some queries is positive"
        )
    order = np.argsort(-diagonal, kind="stable").astype(np.int32)
    half = moment / mean / 2
    metric = (half + half.T)[np.ix_(order, order)] + damping * np.eye(len(order))
    try:
        # H = R R^T, R upper, so that the inverse of H is U^T U with U the inverse of R, upper too.
        lower = np.linalg.cholesky(metric[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise ValueError(
            f"{where} with damping={damping} is not positive definite; give more queries than "
            f"channels, or damping, such as {DAMPING}"
        ) from None
    upper = np.triu(np.linalg.inv(lower[::-1, ::-1]))
    with np.errstate(over="ignore", under="ignore"):
        diagonal = np.diag(upper)
        factor = (upper / diagonal[:, None]).astype(np.float32)
        weights = (diagonal.min() / diagonal).astype(np.float32)
    if not (np.isfinite(factor).all() and weights.all()):
        raise ValueError(
            f"{where} with damping={damping} has a factor beyond float32; give damping, such as "
            f"{DAMPING}"
        )
    np.fill_diagonal(factor, weights)
    return order, factor + np.float32(0)  # no -0
