"""KVCache against lists of tokens that are encoded from scratch: any steps, in any order."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nsq_ref import Feedback, KVCache, RangeError, Scheme, dequantize
from nsq_ref.cache import pages
from nsq_ref.strategies import feedbacks
from tests.support.cache_model import (
    DTYPES,
    CacheList,
    RowList,
    TokenList,
    bits,
    cache_schemes,
    everything,
)

Array = npt.NDArray[Any]

NO_APPENDS = (
    "nan", "infinity", "beyond float32", "shape", "tokens", "channels", "dtype of keys",
    "dtype of values", "too many", "too few lengths", "negative length", "no integers",
)  # fmt: skip
NO_CROPS = ("beyond", "one beyond", "negative", "no integer")
NO_ROWS = ("beyond", "negative", "none")


class CacheMachine(RuleBasedStateMachine):
    """Caches, their forks among them, each beside its lists."""

    @initialize(
        key=cache_schemes,
        value=cache_schemes,
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 2),
        channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        feedback=st.booleans(),
        data=st.data(),
        page_tokens=st.sampled_from([1, 4, 512]),
        seed=st.integers(0, 2**32 - 1),
    )
    def start(
        self,
        key: Scheme,
        value: Scheme,
        batch: int,
        kv_heads: int,
        channels: tuple[int, int],
        feedback: bool,
        data: st.DataObject,
        page_tokens: int,
        seed: int,
    ) -> None:
        self.usual_page_tokens = pages.PAGE_TOKENS
        pages.PAGE_TOKENS = page_tokens
        self.rng = np.random.default_rng(seed)
        self.kv_heads, self.channels = kv_heads, channels
        self.feedback: Feedback | None = None
        if feedback:  # F1, of one head for all, or of each
            heads = data.draw(st.sampled_from([1, kv_heads]))
            self.feedback = data.draw(feedbacks(heads, channels[0]))
        self.options = {"value_head_dim": channels[1], "key_feedback": self.feedback}
        cache = KVCache(batch, kv_heads, channels[0], key, value, **self.options)
        row = RowList(TokenList(key, feedback=self.feedback), TokenList(value))
        self.pairs = [(cache, CacheList((row,) * batch))]
        self.touched = 0

    def teardown(self) -> None:
        if hasattr(self, "pairs"):
            pages.PAGE_TOKENS = self.usual_page_tokens

    def vectors(self, batch: int, tokens: int, dtype: Any, channels: int, huge: bool) -> Array:
        """Values of wild norms, with zeros; huge ones may be refused once their block is full."""
        shape = (batch, self.kv_heads, tokens, channels)
        x = self.rng.standard_normal(shape) * 10.0 ** self.rng.integers(-4, 3, (*shape[:3], 1))
        x[self.rng.random(shape) < 0.2] = 0
        x[self.rng.random(shape[:3]) < 0.1] = 0
        if huge and x.size:
            x[tuple(self.rng.integers(0, shape))] = 65504 if dtype == np.float16 else 1e6
        return x.astype(dtype)

    def pick(self, which: int) -> tuple[KVCache, CacheList]:
        self.touched = which % len(self.pairs)
        return self.pairs[self.touched]

    def now(self, cache: KVCache, model: CacheList) -> None:
        self.pairs[self.touched] = (cache, model)

    def state(self) -> Any:
        return everything([cache for cache, _ in self.pairs])

    # --- what is done ---------------------------------------------------------------------------

    @rule(
        which=st.integers(0, 3),
        tokens=st.integers(0, 12),
        steps=st.integers(1, 3),
        ragged=st.booleans(),
        dtype=st.sampled_from([*sorted(DTYPES), "float64"]),
        huge=st.integers(0, 4).map(lambda n: n == 4),
    )
    def append(
        self, which: int, tokens: int, steps: int, ragged: bool, dtype: str, huge: bool
    ) -> None:
        for _ in range(steps):
            cache, model = self.pick(which)
            if model.dtype is not None and not (dtype == "float64" and model.dtype == "float32"):
                dtype = model.dtype
            kept = "float32" if dtype == "float64" else dtype
            batch = len(model.rows)
            keys, values = (
                self.vectors(batch, tokens, DTYPES.get(dtype, np.float64), channels, huge)
                for channels in self.channels
            )
            lengths = self.rng.integers(0, tokens + 1, batch) if ragged else [tokens] * batch
            rows = []
            for row, (old, length) in enumerate(zip(model.rows, lengths, strict=True)):
                given = (x[row, :, :length].astype(DTYPES[kept]) for x in (keys, values))
                rows.append(old.grown(*given))
                keys[row, :, length:] = np.nan
                values[row, :, length:] = np.nan
            grown = CacheList(tuple(rows), kept)
            if not self.can_be_coded(grown):
                self.append_what_cannot_be_coded(keys, values, lengths)
                return
            cache.append(keys, values, lengths if ragged else None)
            self.now(cache, grown)
            keys[...] = values[...] = -1  # the caller's memory is the caller's

    def can_be_coded(self, model: CacheList) -> bool:
        try:
            model.bits()
        except RangeError:
            return False
        return True

    def append_what_cannot_be_coded(self, keys: Array, values: Array, lengths: Any) -> None:
        cache, model = self.pairs[self.touched]
        before = self.state()
        with pytest.raises(RangeError, match="Nothing was appended") as refusal:
            cache.append(keys, values, lengths)
        assert self.state() == before
        # Where tokens of earlier appends are the reason, the message says how to go on.
        if remedy := re.search(r"of row (\d+), .*; crop to (\d+) ", str(refusal.value)):
            row, length = map(int, remedy.groups())
            kept = [length if r == row else old.length for r, old in enumerate(model.rows)]
            self.crop_to(kept)

    @rule(which=st.integers(0, 3), tokens=st.integers(1, 12), kind=st.sampled_from(NO_APPENDS))
    def append_what_is_refused(self, which: int, tokens: int, kind: str) -> None:
        cache, model = self.pick(which)
        batch = len(model.rows)
        dtype = DTYPES[model.dtype or "bfloat16"]
        arrays = [self.vectors(batch, tokens, dtype, c, False) for c in self.channels]
        side = int(self.rng.integers(2))
        x, lengths = arrays[side], [tokens] * batch
        place = tuple(self.rng.integers(0, x.shape))
        if kind in ("nan", "infinity"):
            x[place] = np.nan if kind == "nan" else -np.inf
        elif kind == "beyond float32":
            arrays[side] = x.astype(np.float64)
            arrays[side][place] = 1e300
        elif kind == "shape":
            arrays[side] = x[0]
        elif kind == "tokens":
            arrays[side] = x[:, :, 1:]
        elif kind == "channels":
            arrays[side] = np.concatenate([x, x], axis=3)
        elif kind == "dtype of keys":
            arrays[0] = arrays[0].astype(np.float32 if dtype == np.float16 else np.float16)
        elif kind == "dtype of values":
            arrays[1] = arrays[1].astype(np.float32 if dtype == np.float16 else np.float16)
        elif kind == "too few lengths":
            lengths = lengths[1:]
        else:
            wrong = {"too many": tokens + 1, "negative length": -1, "no integers": 1.0}
            lengths[-1] = wrong[kind]  # type: ignore[call-overload]
        before = self.state()
        with pytest.raises((ValueError, TypeError), match=r"^(keys|values|lengths)"):
            cache.append(*arrays, lengths)
        assert self.state() == before

    def crop_to(self, lengths: list[int]) -> None:
        cache, model = self.pairs[self.touched]
        cache.crop(lengths)
        rows = (row.cropped(length) for row, length in zip(model.rows, lengths, strict=True))
        self.now(cache, model._replace(rows=tuple(rows)))

    @rule(which=st.integers(0, 3))
    def crop_each_row(self, which: int) -> None:
        _, model = self.pick(which)
        self.crop_to([int(self.rng.integers(0, row.length + 1)) for row in model.rows])

    @rule(which=st.integers(0, 3), fraction=st.floats(0, 1))
    def crop_all(self, which: int, fraction: float) -> None:
        cache, model = self.pick(which)
        length = int(fraction * len(cache))
        cache.crop(length)
        rows = (row.cropped(min(length, row.length)) for row in model.rows)
        self.now(cache, model._replace(rows=tuple(rows)))

    @rule(which=st.integers(0, 3), beams=st.integers(1, 3))
    def reorder(self, which: int, beams: int) -> None:
        cache, model = self.pick(which)
        chosen = self.rng.integers(0, len(model.rows), beams)
        cache.reorder(chosen)
        self.now(cache, model._replace(rows=tuple(model.rows[row] for row in chosen)))

    @rule(which=st.integers(0, 3), crop=st.sampled_from(NO_CROPS), rows=st.sampled_from(NO_ROWS))
    def crop_and_reorder_to_what_is_not_there(self, which: int, crop: str, rows: str) -> None:
        cache, model = self.pick(which)
        each = [row.length for row in model.rows]
        most = max(each)
        each[-1] += 1
        lengths: dict[str, Any] = {
            "beyond": most + 1, "one beyond": each, "negative": -1, "no integer": 0.0
        }  # fmt: skip
        chosen = {"beyond": [0, len(each)], "negative": [-1], "none": []}[rows]
        before = self.state()
        with pytest.raises((ValueError, TypeError), match=r"^length"):
            cache.crop(lengths[crop])
        for what in (cache.reorder, cache.fork):
            with pytest.raises((ValueError, TypeError), match=r"^rows"):
                what(chosen)
        assert self.state() == before

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(which=st.integers(0, 3), how=st.sampled_from(["rows", "fork", "copy", "deepcopy"]))
    def fork(self, which: int, how: str) -> None:
        cache, model = self.pick(which)
        if how == "rows":
            chosen = self.rng.integers(0, len(model.rows), 2)
            forked = cache.fork(chosen)
            model = model._replace(rows=tuple(model.rows[row] for row in chosen))
        else:
            forked = {"fork": KVCache.fork, "copy": copy.copy, "deepcopy": copy.deepcopy}[how](
                cache
            )
        self.pairs.append((forked, model))

    @rule(which=st.integers(0, 3), how=st.sampled_from(["file", "pickle"]))
    def carry_elsewhere(self, which: int, how: str) -> None:
        cache, model = self.pick(which)
        if how == "pickle":
            self.now(pickle.loads(pickle.dumps(cache)), model)
            return
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder) / "first", Path(folder) / "second"
            cache.save(first)
            loaded = KVCache.load(first, key_feedback=self.feedback)
            loaded.save(second)
            assert first.read_bytes() == second.read_bytes()
        self.now(loaded, model)

    @rule(which=st.integers(0, 3))
    def attend(self, which: int) -> None:
        """What a cache has been through does not show in a bit of what attention gives."""
        cache, model = self.pick(which)
        counts = [min(2, row.length) for row in model.rows]
        query = self.rng.standard_normal((len(counts), self.kv_heads, 2, self.channels[0]))
        for index, row in enumerate(model.rows):
            if not row.length:
                continue
            sizes = 1, self.kv_heads, self.channels[0]
            fresh = KVCache(*sizes, cache.key, cache.value, **self.options)
            fresh.append(*(np.stack(side.tokens, axis=1)[None] for side in row))
            expected = fresh.attend(
                query[index : index + 1], query_lengths=counts[index : index + 1]
            )
            output = cache.attend(query, query_lengths=counts)[index : index + 1]
            assert output.tobytes() == expected.tobytes()

    # --- what must hold -------------------------------------------------------------------------

    @invariant()
    def all_store_what_their_lists_say(self) -> None:
        for cache, model in getattr(self, "pairs", []):
            expected = model.bits()
            assert cache.lengths.tolist() == [row.length for row in model.rows]
            assert (None if cache.dtype is None else cache.dtype.name) == model.dtype
            assert bits(cache) == expected
            sizes = (v for row in expected for n, v in row.items() if not n.endswith("collapsed"))
            assert cache.nbytes == sum(len(array[2]) for array in sizes)

    @invariant()
    def touched_decodes_to_what_it_stores(self) -> None:
        if not hasattr(self, "pairs"):
            return
        cache, _ = self.pairs[self.touched]
        for side, decoded in zip(("keys", "values"), cache.dequantize(), strict=True):
            for row, length in enumerate(cache.lengths):
                sinks, sealed, tail, _ = getattr(cache.stored(row), side)
                middle = [] if sealed is None else [dequantize(sealed)]
                parts = [sinks, *middle, tail]
                whole = np.concatenate([part.astype(np.float32) for part in parts], axis=1)
                assert decoded[row, :, :length].tobytes() == whole.tobytes()
                assert not decoded[row, :, length:].any()


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


class TestAnyOrder(CacheMachine.TestCase):  # type: ignore[misc,name-defined]
    """Any steps give the bytes of a fresh encoding; what is refused leaves no trace."""
