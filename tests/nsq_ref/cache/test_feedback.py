"""KVCache with key feedback: what it is given, and what a saved one needs to go on (F1)."""

from __future__ import annotations

import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from nsq_ref import Feedback, KVCache, Scheme, files, quantize
from nsq_ref.files.containers import CACHE_FORMAT, read_container, write_container
from tests.support.cache_model import bits, everything, normals

KEY = Scheme(bits=2, symmetric=False, magnitude="gain", block_size=4, sink_tokens=1)
FEEDBACK, OTHER = (
    Feedback.from_queries(normals(4, 30, 8, seed=seed) @ normals(8, 8, seed=9), kv_heads=2)
    for seed in (1, 2)
)


def cache_of(feedback: Feedback | None, tokens: int = 11) -> KVCache:
    cache = KVCache(2, 2, 8, KEY, KEY, key_feedback=feedback)
    cache.append(*normals(2, 2, 2, tokens, 8))
    return cache


def test_keys_alone_are_fed_back() -> None:
    """F1 B1: sealed blocks of keys; values, sinks and tail are as without."""
    plain, fed = (cache_of(feedback).stored(1) for feedback in (None, FEEDBACK))
    keys = normals(2, 2, 2, 11, 8)[0, 1, :, 1:9]
    expected = quantize(keys, replace(KEY, sink_tokens=0), feedback=FEEDBACK)
    assert fed.keys.sealed is not None
    assert plain.keys.sealed is not None
    for name, part in expected.parts.items():
        assert fed.keys.sealed.parts[name].tobytes() == part.tobytes()
    assert fed.keys.sealed.packed.tobytes() != plain.keys.sealed.packed.tobytes()
    for name, array in plain.values.arrays.items():
        assert fed.values.arrays[name].tobytes() == array.tobytes()
    for name in ("sinks", "tail"):
        assert fed.keys.arrays[name].tobytes() == plain.keys.arrays[name].tobytes()


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_bytes_are_the_same_however_tokens_arrive(step: int) -> None:
    """F1 B1: and whoever else appends to forks at the same time."""
    x = normals(2, 2, 2, 50, 8)
    whole = cache_of(FEEDBACK, 50)
    caches = [KVCache(2, 2, 8, KEY, KEY, key_feedback=FEEDBACK)]
    caches += [caches[0].fork() for _ in range(3)]

    def fill(cache: KVCache) -> None:
        for t in range(0, 50, step):
            cache.append(*x[..., t : t + step, :])

    threads = [threading.Thread(target=fill, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bits(cache) == bits(whole) for cache in caches)
    assert all(cache.key_feedback is FEEDBACK for cache in caches)


def test_a_saved_cache_says_what_it_needs(tmp_path: Path) -> None:
    """F1: a file holds no feedback; without it the cache can be read, but not go on."""
    path = tmp_path / "cache.safetensors"
    whole = cache_of(FEEDBACK)
    whole.save(path)
    read = KVCache.load(path)
    assert bits(read) == bits(whole)
    assert read.key_feedback is None
    query, more = normals(2, 4, 1, 8), normals(2, 2, 2, 7, 8)
    ahead = more[0], more[1]
    assert np.array_equal(read.attend(query, ahead=ahead), whole.attend(query, ahead=ahead))
    read.crop(8)
    assert len(read) == 8
    again = tmp_path / "again.safetensors"
    for cache in (KVCache.load(path), KVCache.load(path).fork(), read):
        before = everything(cache)
        with pytest.raises(ValueError, match=f"give KVCache.load the key_feedback whose digest .*"
                           f"{FEEDBACK.digest[:12]}"):  # fmt: skip
            cache.append(*more)
        assert everything(cache) == before
    read.save(again)
    with pytest.raises(ValueError, match="coded with feedback, which its file does not hold"):
        KVCache.load(again).append(*more)
    loaded = KVCache.load(path, key_feedback=FEEDBACK)
    for cache in (loaded, whole):
        cache.append(*more)
    assert bits(loaded) == bits(whole)


def test_feedback_of_another_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    cache_of(FEEDBACK).save(path)
    message = f"begins with {FEEDBACK.digest[:12]}; that of key_feedback, with {OTHER.digest[:12]}"
    with pytest.raises(ValueError, match=message):
        KVCache.load(path, key_feedback=OTHER)
    cache_of(None).save(path)
    assert KVCache.load(path).key_feedback is None
    with pytest.raises(ValueError, match="coded without feedback; leave key_feedback out"):
        KVCache.load(path, key_feedback=FEEDBACK)


@pytest.mark.parametrize("digest", [None, 5, "", "a", "0" * 65, ["0" * 64]])
def test_a_field_that_is_no_digest(tmp_path: Path, digest: Any) -> None:
    path = tmp_path / "cache.safetensors"
    cache_of(FEEDBACK).save(path)
    with safe_open(path, framework="np") as file:
        own = set(file.keys())
    content, arrays = read_container(path, CACHE_FORMAT, lambda _: own)
    content["cache"]["key_feedback"] = digest
    write_container(path, CACHE_FORMAT, content, arrays)
    with pytest.raises(files.StorageError, match=r"key_feedback is .*, not a digest"):
        KVCache.load(path)


def test_files_without_feedback_are_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    cache_of(None).save(path)
    assert b"key_feedback" not in path.read_bytes()


def test_a_pickle_goes_on() -> None:
    """F1: it holds the feedback, as it belongs to no file of a model."""
    cache = cache_of(FEEDBACK)
    other = pickle.loads(pickle.dumps(cache))
    more = normals(2, 2, 2, 7, 8)
    for one in (cache, other):
        one.append(*more)
    assert bits(other) == bits(cache)
    assert other.key_feedback.digest == FEEDBACK.digest
    assert not other.key_feedback.factor.flags.writeable


@pytest.mark.parametrize(
    ("feedback", "kind", "message"),
    [
        (FEEDBACK.head(0), TypeError, "^key_feedback must be a Feedback, got HeadFeedback"),
        (FEEDBACK, ValueError, "^key_feedback is of 2 heads of 8 channels, and the cache has 3 of"),
        (
            Feedback.from_queries(np.eye(4)[None], kv_heads=1),
            ValueError,
            "^key_feedback is of 1 heads of 4 channels, and the cache has 3 of 8",
        ),
    ],
)
def test_what_no_cache_takes(feedback: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        KVCache(1, 3, 8, key_feedback=feedback)
