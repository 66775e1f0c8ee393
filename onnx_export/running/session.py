"""A model and the cache of what it has read: the loop for any model that describes its cache."""

from __future__ import annotations

import copy
import os
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsq_ref.arrays import as_integer, as_integers
from onnx_export.running import feeding, generate
from onnx_export.running.cache import Cache
from onnx_export.running.generate import Ending, Generated
from onnx_export.running.memory import Memory
from onnx_export.running.model import Model
from onnx_export.running.sampling import Sampling

__all__ = ["Session"]

PathLike = str | os.PathLike[str]
GREEDY = Sampling()


class Session:
    """A model that reads tokens into a cache, which it keeps; for one thread at a time.

    The model's metadata says what its cache is. Tensors of fixed size are made once, with room for
    `capacity` tokens, and each step appends to them in place.

    Parameters
    ----------
    model : Model, str or os.PathLike
        Its file, or what other sessions have loaded.
    capacity : int, optional
        Tokens that there is room for in a row, rounded up to whole blocks; the model's context
        length when not given. The system gives the memory as it is written to.
    batch : int
        Rows that are read at the same time.
    threads : int, optional
        All cores when not given. Not for a `Model`, which has them.
    library : bool
        As `Model` takes it.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or range, or no capacity is given where neither the model
        says how long its context is; as `Model`.
    FileNotFoundError
        As `Model`.

    Examples
    --------
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> session = Session(tiny_onnx())
    >>> session.generate([3, 1, 4], 2)
    [Generated(tokens=array([...]), ended_by='max_new_tokens')]
    >>> session.lengths  # the last token was not read
    (4,)
    """

    def __init__(
        self,
        model: Model | PathLike,
        *,
        capacity: int | None = None,
        batch: int = 1,
        threads: int | None = None,
        library: bool = True,
    ) -> None:
        if isinstance(model, Model):
            if threads is not None:
                raise ValueError(f"threads={threads} is for a path; this model has its own")
        else:
            model = Model(model, threads=threads, library=library)
        layout = model.layout
        if capacity is not None:
            capacity = as_integer("capacity", capacity, least=1)
        elif (capacity := layout.context_length) is None:
            raise ValueError(f"{model.path} does not say how long its context is; give a capacity")
        self.model, self.batch = model, as_integer("batch", batch, least=1)
        self.capacity = layout.rounded(capacity)
        self._cache = Cache(model, self.batch, self.capacity)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row that are in the cache."""
        return self._cache.lengths

    @property
    def limit(self) -> int:
        """Tokens that a row can have: the capacity, or the model's context if that is shorter."""
        return self._cache.limit

    def forward(self, input_ids: Any, *, num_logits: int | None = 1) -> NDArray[Any]:
        """Read tokens, after those that are in the cache.

        Parameters
        ----------
        input_ids : array_like of int, or list of such
            ``[batch, sequence]``; a list of rows if they differ in length, which a model can read
            that takes lengths or a mask of padding; ``[sequence]`` for a single row.
        num_logits : int, optional
            Return logits of this many of the last tokens; all when not given. Of rows that differ
            in length, 1 or 0.

        Returns
        -------
        numpy.ndarray
            ``[batch, num_logits, vocab_size]``, in the dtype of the model; fewer where fewer tokens
            were read.

        Raises
        ------
        TypeError, ValueError
            If an argument has the wrong shape, dtype or range, there is no room for so many tokens,
            or the model refuses what it has to compute. The cache is as it was then.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx(), batch=2)
        >>> session.forward([[3, 1, 4], [1, 5, 9]]).shape
        (2, 1, 260)
        """
        rows = feeding.as_rows(input_ids, self.batch, self.model.vocab_size)
        if num_logits is not None:
            num_logits = as_integer("num_logits", num_logits, least=0)
        if len({len(row) for row in rows}) > 1 and num_logits not in (0, 1):
            raise ValueError(
                f"num_logits={num_logits} of rows that differ in length; give 1, or rows of one "
                "length"
            )
        return self._cache.read(rows, num_logits)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        stop_tokens: Any = None,
        sampling: Sampling = GREEDY,
    ) -> list[Generated]:
        """Read tokens and continue each row, until something ends it.

        Where the room for tokens ends before a text does, what was generated until then is
        returned. The last token of a row is not in the cache, as it need not be read: whoever goes
        on with it begins with that one.

        Parameters
        ----------
        input_ids : array_like of int, or list of such
            As `forward` takes them.
        max_new_tokens : int
        stop_tokens : int or sequence of int, optional
            Stop after one of these.
        sampling : Sampling
            The most likely token by default.

        Returns
        -------
        list of Generated
            A text for each row.

        Raises
        ------
        TypeError, ValueError
            As `forward`, before anything is read.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx(), capacity=20)
        >>> (text,) = session.generate([3] * 19, 5, sampling=Sampling(0.7, top_p=0.9, seed=1))
        >>> text.tokens.shape, text.ended_by
        ((2,), 'capacity')
        """
        most, stops = generate.as_limits(max_new_tokens, stop_tokens)
        full: Ending = "context_length" if self._cache.context_limits else "capacity"
        tokens = self.steps(input_ids, most, stop_tokens=stop_tokens, sampling=sampling)
        return generate.collected(tokens, most, stops, full)

    def stream(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        stop_tokens: Any = None,
        sampling: Sampling = GREEDY,
    ) -> Generator[int, None, None]:
        """Yield the tokens of `generate` one by one, as soon as each is known; for a single row.

        What was yielded is yours, whatever becomes of the rest, and in the cache is all but the
        last of it.

        Raises
        ------
        TypeError, ValueError
            As `generate`, and at once.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx())
        >>> len(list(session.stream([3, 1, 4], 5)))
        5
        """
        if self.batch != 1:
            raise ValueError(f"the session has batch={self.batch}; steps yields tokens of all rows")
        tokens = self.steps(input_ids, max_new_tokens, stop_tokens=stop_tokens, sampling=sampling)
        return (int(token[0]) for token in tokens)

    def steps(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        stop_tokens: Any = None,
        sampling: Sampling = GREEDY,
    ) -> Generator[NDArray[np.int64], None, None]:
        """Yield the next token of every row, int64 ``[batch]``, -1 for rows that have ended.

        Raises
        ------
        TypeError, ValueError
            As `generate`, and at once.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx(), batch=2)
        >>> [tokens.shape for tokens in session.steps([[3, 1], [4, 1]], 3)]
        [(2,), (2,), (2,)]
        """
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {type(sampling).__name__}")
        most, stops = generate.as_limits(max_new_tokens, stop_tokens)
        prompts = feeding.as_rows(input_ids, self.batch, self.model.vocab_size)
        self._cache.require(prompts)
        return generate.steps(
            lambda rows: self._cache.read(rows, 1),
            self._cache.has_room,
            prompts,
            skips_rows=self.model.skips_rows,
            max_new_tokens=most,
            stop_tokens=stops,
            sampling=sampling,
        )

    def crop(self, length: int | ArrayLike) -> None:
        """Keep the first tokens only.

        Of a quantized cache, the first tokens of a block that is cut in two go back to the tail, as
        their decoded values: what `nsq_ref.KVCache.crop` does, byte for byte (rule C1). Elsewhere
        the cache is then that of a session that never read more.

        Parameters
        ----------
        length : int or sequence of int
            Of all rows, or of each; at most what there is.

        Raises
        ------
        TypeError, ValueError
            If it is no such length, rows of this model must be equally long, or a tensor of its
            cache has no axis of tokens. The cache is as it was then.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx())
        >>> first = session.generate([3, 1, 4, 1], 5)[0].tokens
        >>> session.crop(3)
        >>> bool((session.generate([1], 5)[0].tokens == first).all())
        True
        """
        if isinstance(length, int) or np.ndim(length) == 0:
            length = [as_integer("length", length)] * self.batch
        most = self._cache.lengths
        self._cache.crop(as_integers("length", length, count=self.batch, least=0, most=most))

    def fork(self, rows: Any = None) -> Session:
        """Return a session of its own that goes on from here, with a copy of the cache.

        Parameters
        ----------
        rows : sequence of int, optional
            Which rows it has, in this order, also more than once; all by default.

        Raises
        ------
        TypeError, ValueError
            If there are no such rows.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx())
        >>> _ = session.forward([3, 1, 4])
        >>> session.fork([0, 0, 0]).lengths
        (3, 3, 3)
        """
        every = list(range(self.batch))
        chosen = every if rows is None else as_integers("rows", rows, least=0, most=self.batch - 1)
        if not chosen:
            raise ValueError("rows is empty; give at least one row")
        other = copy.copy(self)
        other.batch, other._cache = len(chosen), self._cache.copied(chosen)
        return other

    def save(self, path: PathLike) -> None:
        """Write what the cache holds to a safetensors file, whole or not at all.

        Raises
        ------
        OSError
            If the file cannot be written; what was there before is untouched.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx())
        >>> _ = session.forward([3, 1, 4])
        >>> path = session.model.path.with_name("state.safetensors")
        >>> session.save(path)
        >>> other = session.fork()
        >>> other.crop(0)
        >>> other.restore(path)
        >>> other.lengths
        (3,)
        """
        self._cache.save(path)

    def restore(self, path: PathLike) -> None:
        """Replace what the cache holds by what `save` wrote, of the same model and as many rows.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is damaged, of another model, has other rows, or more tokens than there is room
            for. The cache is as it was then.

        Examples
        --------
        See `save`.
        """
        self._cache.restore(path)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of the cache by the names of their inputs: its own memory, to be read.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx())
        >>> _ = session.forward([3, 1, 4])
        >>> session.tensors()["past_key_values.0.key"].shape
        (1, 2, 3, 8)
        """
        return self._cache.tensors()

    def resume(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Go on from tensors that `tensors` returned, of a model whose cache only grows.

        They are not copied and not changed; rows are equally long, without padding.

        Raises
        ------
        TypeError, ValueError
            For another kind of model, a tensor that is missing, and another shape or dtype.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx())
        >>> _ = session.forward([3, 1, 4])
        >>> other = Session(session.model)
        >>> other.resume(session.tensors())
        >>> other.lengths
        (3,)
        """
        self._cache.resume(tensors)

    def pretend(self, length: int) -> None:
        """Hold ones in place of so many tokens, to see what they cost without reading them.

        What was in the cache is lost, and what is read after it means nothing; `crop` to 0 before
        the next prompt.

        Parameters
        ----------
        length : int
            Tokens of each row, at most `capacity`.

        Raises
        ------
        TypeError, ValueError
            If the length is out of range, or the model's cache grows or is in buffers.

        Examples
        --------
        >>> from nsq_ref import Scheme
        >>> from onnx_export.models.attention_forms import QuantizedAttention
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> scheme = Scheme.named("streaming4")
        >>> session = Session(tiny_onnx(QuantizedAttention(scheme, scheme)))
        >>> session.pretend(500)
        >>> session.lengths, session.forward([3]).shape
        ((500,), (1, 1, 260))
        """
        self._cache.pretend(as_integer("length", length, least=0, most=self.capacity))

    def memory(self) -> Memory:
        """Return how many bytes the cache takes.

        Examples
        --------
        >>> from onnx_export.models.tiny import tiny_onnx
        >>> session = Session(tiny_onnx())
        >>> _ = session.forward([3] * 100)
        >>> print(session.memory())
        0.03 MB, 200.0% of float16
        """
        return self._cache.memory()
