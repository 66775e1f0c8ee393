"""How much a lossy key-value cache costs a language model, measured in likelihood.

The protocol is *prefill and continuation*. With P the prefill length and C the continuation length,
for every passage of tokens ``t[0], t[1], ...``:

1. The model reads ``t[0:P]``, which fills the cache (in one pass up to 1024 tokens).
2. A transform, such as quantization and dequantization, replaces the keys and values of that cache.
3. The model reads ``t[P:P+C]`` in one forward pass with the replaced cache as its past. The logits
   after ``t[P]``, ..., ``t[P+C-1]`` are scored against the tokens that follow, ``t[P+1:P+C+1]``.

The keys and values of the continuation itself are never transformed. The negative log-likelihood
(NLL) of a passage is the mean over its C scored tokens, in nats. Changes are against the untouched
cache, paired by passage: what makes a passage hard cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsq_ref.arrays import as_integer, as_integer_array
from onnx_export.evaluation.protocols import continued, prefilled
from onnx_export.models.built import Progress
from onnx_export.models.decoder import Decoder, KeyValueCache

Transform: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.float32]], KeyValueCache]
"""``transform(keys, values)`` returns arrays of the same shape and dtype:
float32 ``[layers, batch, kv_heads, tokens, head_dim]``. Its arguments are read-only."""


@dataclass(frozen=True)
class TransformFidelity:
    """Likelihoods with one transform of the cache, and without any.

    It never changes, so that threads may share one.

    Standard errors take passages as independent samples.

    Attributes
    ----------
    nll : tuple of float
        Mean negative log-likelihood of every passage, in nats a token, with the transform.
    baseline_nll : tuple of float
        The same with the untouched cache.

    Examples
    --------
    >>> result = TransformFidelity(nll=(2.2, 3.0), baseline_nll=(2.0, 3.0))
    >>> round(result.nll_change, 6), round(result.nll_change_error, 6)
    (0.1, 0.1)
    >>> round(result.perplexity - result.baseline_perplexity, 6)
    1.281244
    """

    nll: tuple[float, ...]
    baseline_nll: tuple[float, ...]

    @property
    def nll_change(self) -> float:
        """Mean over passages of the change in NLL."""
        return float(np.mean(np.subtract(self.nll, self.baseline_nll)))

    @property
    def nll_change_error(self) -> float:
        """Standard error of `nll_change`, paired by passage."""
        return standard_error(np.subtract(self.nll, self.baseline_nll))

    @property
    def perplexity(self) -> float:
        """Exponential of the mean NLL with the transform; infinite if that overflows."""
        return perplexity(self.nll)

    @property
    def baseline_perplexity(self) -> float:
        """Exponential of the mean NLL with the untouched cache."""
        return perplexity(self.baseline_nll)

    @property
    def perplexity_change(self) -> float:
        """Perplexity with the transform less that of the untouched cache."""
        return self.perplexity - self.baseline_perplexity

    @property
    def perplexity_change_error(self) -> float:
        """Standard error of `perplexity_change`, paired by passage, to first order.

        To first order a passage moves each perplexity by the perplexity times its own NLL.
        """
        if math.isinf(self.perplexity):
            return math.inf
        moves = np.multiply(self.perplexity, self.nll)
        return standard_error(moves - np.multiply(self.baseline_perplexity, self.baseline_nll))


@dataclass(frozen=True)
class Comparison:
    """Two caches on the same passages, and what may be said of them.

    The rule is that of docs/fidelity.md: a difference is stated if it is more than two of its
    standard errors. As a string it is the sentence that follows. It never changes, so that threads
    may share one.

    Attributes
    ----------
    first, second : str
        Names of the caches.
    nll_change : float
        Mean over passages of the NLL with the first less that with the second.
    nll_change_error : float
        Standard error of `nll_change`, paired by passage.

    Examples
    --------
    >>> print(Comparison("naive4", "pchan4", -0.03, 0.01))
    pchan4 costs 0.0300 ± 0.0100 nats a token more than naive4.
    >>> print(Comparison("naive4", "pchan4", -0.02, 0.01))
    naive4 and pchan4 are not told apart: -0.0200 ± 0.0100 nats a token.
    """

    first: str
    second: str
    nll_change: float
    nll_change_error: float

    @property
    def told_apart(self) -> bool:
        """Whether the difference is more than two standard errors."""
        return abs(self.nll_change) > 2 * self.nll_change_error

    def __str__(self) -> str:
        if not self.told_apart:
            return (
                f"{self.first} and {self.second} are not told apart: {self.nll_change:+.4f} ± "
                f"{self.nll_change_error:.4f} nats a token."
            )
        more, less = self.first, self.second
        if self.nll_change < 0:
            more, less = less, more
        return (
            f"{more} costs {abs(self.nll_change):.4f} ± {self.nll_change_error:.4f} nats a token "
            f"more than {less}."
        )


def compare(
    results: Mapping[str, TransformFidelity], first: str, second: str | None = None
) -> Comparison:
    """Compare two transforms, passage by passage.

    Parameters
    ----------
    results : mapping of str to TransformFidelity
        What `measure_fidelity` returned.
    first : str
        A name in it.
    second : str, optional
        Another one; the untouched cache when not given.

    Returns
    -------
    Comparison

    Examples
    --------
    >>> results = {
    ...     "coarse": TransformFidelity(nll=(2.2, 3.0), baseline_nll=(2.0, 3.0)),
    ...     "fine": TransformFidelity(nll=(2.1, 2.9), baseline_nll=(2.0, 3.0)),
    ... }
    >>> print(compare(results, "coarse", "fine"))
    coarse costs 0.1000 ± 0.0000 nats a token more than fine.
    >>> print(compare(results, "coarse"))
    coarse and the float32 cache are not told apart: +0.1000 ± 0.1000 nats a token.
    """
    nll, name = results[first].baseline_nll, "the float32 cache"
    if second is not None:
        nll, name = results[second].nll, second
    paired = TransformFidelity(results[first].nll, nll)
    return Comparison(first, name, paired.nll_change, paired.nll_change_error)


def measure_fidelity(
    decoder: Decoder,
    passages: ArrayLike,
    transforms: Mapping[str, Transform],
    *,
    prefill_length: int = 512,
    continuation_length: int = 128,
    progress: Progress | None = None,
) -> dict[str, TransformFidelity]:
    """Measure what each transform of the key-value cache costs in likelihood.

    The module's documentation says exactly what is scored. Every passage is prefilled once for all
    transforms. The result is deterministic for a given machine and number of threads.

    Parameters
    ----------
    decoder : Decoder
        The model.
    passages : array_like of int
        Token ids, ``[passages, tokens]``, at least 2 passages of at least
        ``prefill_length + continuation_length + 1`` tokens; further tokens are not used.
    transforms : mapping of str to callable
        By name, ``transform(keys, values)`` as `Transform` says.
    prefill_length : int
        Tokens whose cache is transformed.
    continuation_length : int
        Tokens that are scored.
    progress : callable, optional
        Called as ``progress(what, done, total)`` after every forward pass.

    Returns
    -------
    dict of str to TransformFidelity
        The result of every transform, in the order given.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range, or a transform returns a wrong shape,
        dtype or elements that are not finite.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> folder = tempfile.mkdtemp()
    >>> decoder = Decoder.from_gguf(tiny_gguf(folder), cache_dir=folder)
    >>> passages = np.arange(60).reshape(2, 30)
    >>> results = measure_fidelity(
    ...     decoder,
    ...     passages,
    ...     {"exact": lambda keys, values: (keys, values),
    ...      "no values": lambda keys, values: (keys, 0 * values)},
    ...     prefill_length=16,
    ...     continuation_length=8,
    ... )
    >>> results["exact"].nll_change
    0.0
    >>> results["no values"].nll_change != 0
    True
    """
    if not transforms:
        raise ValueError("transforms must name at least one transform")
    stop = prefill_length + continuation_length
    tokens = _checked_passages(passages, prefill_length, continuation_length)
    decoder.config.require_context(stop, "prefill and continuation")
    decoder.config.require_ids(tokens, "passages")
    nll: dict[str, list[float]] = {name: [] for name in transforms}
    baseline: list[float] = []
    total, done = len(tokens) * (2 + len(transforms)), 0

    def report(passage: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(f"passage {passage + 1} of {len(tokens)}", done, total)

    for passage, row in enumerate(tokens):
        keys, values = prefilled(decoder, row[:prefill_length])
        report(passage)

        def continuation_nll(cache: KeyValueCache, row: NDArray[np.int64] = row) -> float:
            logits = continued(decoder, row[prefill_length:stop], cache)
            return mean_nll(logits, row[prefill_length + 1 : stop + 1])

        baseline.append(continuation_nll((keys, values)))
        report(passage)
        for name, transform in transforms.items():
            cache = transform(keys, values)
            _check_cache(name, cache, keys)
            nll[name].append(continuation_nll(cache))
            report(passage)
    return {
        name: TransformFidelity(nll=tuple(nlls), baseline_nll=tuple(baseline))
        for name, nlls in nll.items()
    }


def mean_nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Mean of ``-log softmax(logits)[target]`` in nats, summed in float64.

    Logits are float32 ``[tokens, vocab_size]``, targets int64 ``[tokens]``.

    Examples
    --------
    >>> round(mean_nll(np.zeros((3, 4), np.float32), np.array([0, 1, 3])), 6)
    1.386294
    """
    highest = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(axis=-1, dtype=np.float64))
    scored = np.take_along_axis(logits, targets[:, None], axis=-1).astype(np.float64) - highest
    return float(np.mean(log_sum - scored[:, 0]))


def require_lengths(prefill_length: int, continuation_length: int) -> None:
    """Refuse lengths below 1.

    Examples
    --------
    >>> require_lengths(512, 0)
    Traceback (most recent call last):
    ValueError: continuation_length=0 must be an integer of at least 1
    """
    as_integer("prefill_length", prefill_length, least=1)
    as_integer("continuation_length", continuation_length, least=1)


def _checked_passages(
    passages: ArrayLike, prefill_length: int, continuation_length: int
) -> NDArray[np.int64]:
    require_lengths(prefill_length, continuation_length)
    tokens = as_integer_array("passages", passages)
    needed = prefill_length + continuation_length + 1
    if tokens.ndim != 2:
        raise ValueError(f"passages must have shape [passages, tokens], got {tokens.shape}")
    if tokens.shape[0] < 2 or tokens.shape[1] < needed:
        raise ValueError(
            f"passages has shape {tokens.shape}; a standard error needs at least 2 passages, and "
            f"prefill_length + continuation_length + 1 is {needed} tokens"
        )
    return tokens[:, :needed].astype(np.int64)


def _check_cache(name: str, cache: KeyValueCache, keys: NDArray[np.float32]) -> None:
    if not isinstance(cache, tuple) or len(cache) != 2:
        raise TypeError(f"transform {name!r} must return a tuple (keys, values), got {type(cache)}")
    for kind, array in zip(("keys", "values"), cache, strict=True):
        shape, dtype = np.shape(array), getattr(array, "dtype", type(array))
        if shape != keys.shape or dtype != np.float32:
            wrong = ValueError if dtype == np.float32 else TypeError
            raise wrong(
                f"transform {name!r} must return {kind} as float32 of shape {keys.shape}, got "
                f"{dtype} of shape {shape}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"transform {name!r} returned {kind} that are not finite")


def perplexity(nll: tuple[float, ...]) -> float:
    """Exponential of the mean; infinite if that overflows.

    Examples
    --------
    >>> perplexity((0.0, 0.0)), perplexity((1000.0,))
    (1.0, inf)
    """
    try:
        return math.exp(math.fsum(nll) / len(nll))
    except OverflowError:
        return math.inf


def standard_error(samples: NDArray[np.float64]) -> float:
    """Sample deviation over the root of their number.

    Examples
    --------
    >>> standard_error(np.array([0.0, 2.0]))
    1.0
    """
    return float(np.std(samples, ddof=1) / math.sqrt(len(samples)))
