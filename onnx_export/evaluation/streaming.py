"""A cache that grows under quantization: what a model reads while every token is its own past."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nsq_ref.environment import in_default_environment
from nsq_ref.rivals import Codec, SchemeCodec, Unquantized
from nsq_ref.rivals.scaled import StaticChannels
from onnx_export.evaluation.methods import Bound, KeyValueCache, Run, Size

__all__ = ["StreamedCache"]

PROBED = 1024  # tokens up to which a codec that keeps its last ones has kept some


class StreamedCache:
    """Keys and values as a quantized cache gives them back, sealed block by block as they come.

    New tokens are kept as they are until their block is full. Then the block is coded for good,
    from what it was made as, and read back from its codes ever after. That is what
    `nsq_ref.KVCache` does. Whoever has no blocks gets some of ``block`` tokens, so that all keep
    tails alike; whoever keeps last tokens by itself (KIVI's residual window) seals by its own rule.

    Parameters
    ----------
    method : Bound
    shapes : pair of tuples of int
        Of keys and of values, ``[layers, batch, kv_heads, tokens, head_dim]`` for all tokens that
        there will be.
    block : int
        Tokens of a block for methods without, and the most that are read at once.

    Examples
    --------
    >>> from onnx_export.evaluation.methods import Method
    >>> x = np.random.default_rng(0).standard_normal((1, 1, 2, 200, 8), dtype=np.float32)
    >>> cache = StreamedCache(Method.of("streaming4").bound(1), (x.shape, x.shape), block=128)
    >>> cache.piece(200)  # a sink, and a block
    129
    >>> cache.append(x[..., :129, :], x[..., :129, :])
    >>> [bool((cache.past[0][..., at, :] == x[..., at, :]).all()) for at in (0, 1)]
    [True, False]
    >>> cache.append(x[..., 129:, :], x[..., 129:, :])
    >>> bool((cache.past[0][..., 129:, :] == x[..., 129:, :]).all())
    True
    """

    def __init__(
        self, method: Bound, shapes: tuple[tuple[int, ...], tuple[int, ...]], block: int
    ) -> None:
        self.method, self.block, self.length = method, block, 0
        self._arrays = tuple(np.zeros(shape, np.float32) for shape in shapes)
        self._ends = [0] * len(method.runs)  # of what each run has sealed
        self._codecs = [_in_blocks(run.codec, block) for run in method.runs]
        self._own_tail = [_keeps_last(codec) for codec in self._codecs]
        self._sealed = Size(0, 0, 0)

    @property
    def past(self) -> KeyValueCache:
        """What the model reads next to its new tokens."""
        keys, values = (array[..., : self.length, :] for array in self._arrays)
        return keys, values

    def sizes(self, new: Iterable[int] = (-1,)) -> Size:
        """Return what it takes, summed over steps: those at which token ``new`` has come next.

        By default it is what it takes now. Tail and sinks are what is not sealed.
        """
        token = sum(array[..., :1, :].size for array in self._arrays)
        lengths = [self.length + 1 + one for one in new]
        bits, elements, _ = self._sealed
        kept = token * sum(lengths) - elements * len(lengths)
        return Size(bits * len(lengths), elements * len(lengths), kept)

    def piece(self, most: int) -> int:
        """Return how many of the next tokens are read at once: up to where a block is full.

        A method that seals single tokens seals after each piece.
        """
        left, most = most, min(most, self.block)
        runs = range(len(self._ends))
        if not self.length:  # sinks belong to no block
            most += max(self._coded(run, self.block)[0] for run in runs)
        for length in range(self.length + 1, self.length + most):
            ends = [(self._coded(run, length - 1)[1], self._coded(run, length)[1]) for run in runs]
            if any(after > before + 1 for before, after in ends):
                return min(length - self.length, left)
        return min(most, left)

    @in_default_environment
    def append(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Take new tokens, ``[layers, batch, kv_heads, new, head_dim]``, and seal full blocks."""
        start, self.length = self.length, self.length + keys.shape[-2]
        for array, new in zip(self._arrays, (keys, values), strict=True):
            array[..., start : self.length, :] = new
        with np.errstate(all="ignore"):  # what overflows is refused by name
            for number, run in enumerate(self.method.runs):
                if isinstance(run.codec, Unquantized):
                    self._round(run, start)
                first, last = self._coded(number, self.length)
                begin = max(self._ends[number], first)
                if last > begin:
                    self._seal(run, begin, last, fresh=not self._ends[number])
                    self._ends[number] = last

    def _round(self, run: Run, start: int) -> None:
        index = (run.layers, ..., slice(start, self.length), slice(None))
        array = self._arrays[run.side]
        array[index] = run.codec(array[index]).x_hat

    def _seal(self, run: Run, begin: int, end: int, *, fresh: bool) -> None:
        array, index = self._arrays[run.side], (run.layers, ..., slice(begin, end), slice(None))
        x = array[index]
        parts = run.codec.encode(x)
        read = run.codec.decode({name: part.values for name, part in parts.items()}, x.shape)
        if not np.isfinite(read).all():
            raise ValueError("what is read back is beyond float32; scale the model down")
        array[index] = read
        # Static scales are those of all blocks.
        static = isinstance(run.codec, StaticChannels) and not fresh
        bits = sum(p.size_in_bits for name, p in parts.items() if not (static and name == "scale"))
        self._sealed = self._sealed.plus(Size(bits, x.size, 0))

    def _coded(self, run: int, tokens: int) -> tuple[int, int]:
        """Return the first token that is ever coded, and the last that is by now."""
        codec = self._codecs[run]
        if isinstance(codec, SchemeCodec):
            cut = codec.scheme.cut(tokens)
            return cut.sinks, cut.sinks + cut.sealed
        first, last = codec.coded(tokens)
        if not self._own_tail[run]:
            last -= (last - first) % self.block
        return first, last


def _in_blocks(codec: Codec, block: int) -> Codec:
    """Return a scheme with a block size, and any other codec as it is."""
    if isinstance(codec, SchemeCodec) and codec.scheme.block_size is None:
        return replace(codec, scheme=replace(codec.scheme, block_size=block))
    return codec


def _keeps_last(codec: Codec) -> bool:
    """Whether a codec leaves last tokens alone by itself."""
    if isinstance(codec, Unquantized):
        return True
    return any(codec.coded(tokens)[1] < tokens for tokens in range(1, PROBED))
