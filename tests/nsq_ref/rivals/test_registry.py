"""Every entry is asked the same way, and what is counted is all that reading back needs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from nsq_ref import KeyValueSchemes, Scheme, dequantize, quantize
from nsq_ref.comparison import CacheRoundTrip, round_trips
from nsq_ref.rivals import Codec, Part, SchemeCodec, Stored, entries, entry, entry_of
from nsq_ref.rivals.scaled import StaticChannels
from tests.support.rivals_by_loops import Caches, caches

DOCUMENT = Path(__file__).parents[3] / "docs" / "rivals.md"
SHARED_BY_HEADS = ("oscar", "gear", "nvfp4")
RIVALS = [name for name, one in entries().items() if not one.ours]
FEW = settings(max_examples=4, deadline=None)


def in_bytes(part: Part) -> tuple[bytes, Any]:
    """The part as a file would have it, and how to get it back."""
    values = part.values
    if part.bits == 8 * values.itemsize:
        raw = values.tobytes()
        return raw, lambda: np.frombuffer(raw, values.dtype).reshape(values.shape)
    if values.dtype == np.float32:  # an 8-bit float
        import ml_dtypes

        small = values.astype(ml_dtypes.float8_e4m3fn)
        return small.tobytes(), lambda: small.astype(np.float32)
    if part.bits == 16:  # integers
        short = values.astype(np.uint16)
        return short.tobytes(), lambda: short.astype(values.dtype)
    offset = 2 ** (part.bits - 1) if values.dtype == np.int8 else 0
    codes = (values.astype(np.int16).ravel() + offset).astype(np.uint8)
    planes = np.unpackbits(codes[:, None], axis=-1, count=part.bits, bitorder="little")
    packed = np.packbits(planes)

    def back() -> NDArray[Any]:
        bits = np.unpackbits(packed, count=planes.size).reshape(planes.shape)
        numbers = np.packbits(bits, axis=-1, bitorder="little").astype(np.int16).ravel()
        return (numbers - offset).astype(values.dtype).reshape(values.shape)

    return packed.tobytes(), back


@pytest.mark.parametrize("name", RIVALS)
@given(x=caches(tokens=[70, 300], head_dims=[64]))
@FEW
def test_what_is_counted_is_all_that_is_read(name: str, x: Caches) -> None:
    """Parts go to bytes and come back: as many bits as were counted, and the same arrays."""
    made = entry(name).calibrated(x, x)
    for codec in (made.key, made.value):
        stored = codec(x)
        first, last = codec.coded(x.shape[-2])
        middle = x[..., first:last, :]
        assert stored.sealed_elements == middle.size
        assert stored.kept_elements == x.size - middle.size
        assert stored.kept_bits == 16 * stored.kept_elements
        for kept in (np.s_[:, :first], np.s_[:, last:]):
            assert np.array_equal(stored.x_hat[kept], x[kept].astype(np.float16))
        assert stored.x_hat.dtype == np.float32
        assert stored.x_hat.shape == x.shape
        assert np.isfinite(stored.x_hat).all()
        if not middle.size:
            assert stored.sealed_bits == 0
            continue
        parts = {one: in_bytes(part) for one, part in codec.encode(middle).items()}
        nbytes = sum(len(raw) for raw, _ in parts.values())
        assert 0 <= 8 * nbytes - stored.sealed_bits < 8 * len(parts)
        values = {one: back() for one, (_, back) in parts.items()}
        assert np.array_equal(codec.decode(values, middle.shape), stored.x_hat[:, first:last])


@pytest.mark.parametrize("name", RIVALS)
def test_bits_do_what_they_cost(name: str) -> None:
    """A rough bound that no codec may miss: more bits, less error; nothing stays nothing."""
    x = np.random.default_rng(0).standard_normal((2, 512, 64)).astype(np.float32)
    made = entry(name).calibrated(x, x)
    for codec in (made.key, made.value):
        stored = codec(x)
        codes = [
            part.size_in_bits / x[:, slice(*codec.coded(512))].size
            for kind, part in codec.encode(x[:, slice(*codec.coded(512))]).items()
            if kind in ("codes", "packed", "signs") or ("nsnquant" in name and kind == "index")
        ]
        error = np.linalg.norm(stored.x_hat - x) / np.linalg.norm(x)
        bound = 0.95 if "pca" in name else 2.2 * 2.0 ** -sum(codes)
        assert 0 < error < bound
        assert stored.bits_per_element == (stored.sealed_bits + stored.kept_bits) / x.size
        assert stored.collapsed_tokens == 0
        nothing = codec(np.zeros_like(x))
        assert not nothing.x_hat.any()
        assert nothing.sealed_bits == stored.sealed_bits
        with pytest.raises(ValueError, match=r"x\[1, 2, 3\] is nan"):
            codec(np.where(np.arange(x.size).reshape(x.shape) == 64 * 514 + 3, np.nan, x))


@pytest.mark.parametrize("name", [name for name, one in entries().items() if one.ours])
def test_ours_are_those_of_quantize(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 130, 64)).astype(np.float16)
    for codec in (entry(name).key, entry(name).value):
        assert isinstance(codec, SchemeCodec)
        quantized, stored = quantize(x, codec.scheme), codec(x)
        assert stored.x_hat.tobytes() == dequantize(quantized).tobytes()
        assert stored.sealed_bits + stored.kept_bits == 8 * quantized.nbytes
        assert stored.kept_elements == 2 * 64 * codec.scheme.sink_tokens
        assert stored.kept_bits == 16 * stored.kept_elements
        assert stored.sealed_elements == x.size - stored.kept_elements


def test_names() -> None:
    for name, one in entries().items():
        assert entry(name) is entry_of(name) is one
        assert one.name == name
        assert json.loads(json.dumps(one.to_dict()))["source"]
        assert one.title
    assert entry("nsep+out4-8ch").key.to_dict()["outlier_channels"] == 8
    assert entry("KIVI-K3V8").value.to_dict()["bits"] == 8  # any name of the paper
    for wrong in ("kivi5", "", "KIVI4"):
        with pytest.raises(
            ValueError, match=rf"^unknown scheme name {wrong!r}; known are .* q4_0, "
        ):
            entry(wrong)
    with pytest.raises(TypeError, match="name must be a string"):
        entry(4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="schemes must be a Scheme or a name"):
        entry_of(4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "side", "spans"),
    [
        ("kivi2", "key", {127: (0, 0), 128: (0, 128), 300: (0, 256)}),
        ("kivi2", "value", {128: (0, 0), 129: (0, 1), 300: (0, 172)}),
        ("oscar2", "key", {128: (0, 0), 129: (0, 128), 256: (0, 256), 300: (0, 256)}),
        ("oscar2", "value", {128: (0, 0), 129: (0, 128), 256: (0, 256), 300: (0, 256)}),
        ("kvarn-k4v2", "key", {9: (9, 9), 255: (128, 128), 256: (128, 256), 400: (128, 384)}),
        ("nsnquant2", "key", {63: (0, 0), 64: (0, 64), 130: (0, 128)}),
        ("gear4", "value", {63: (0, 0), 64: (0, 64), 130: (0, 128)}),
        ("nsep+kivi2", "value", {300: (0, 172)}),
        ("hadamard+q4_0", "key", {1: (0, 1)}),
        ("streaming4", "key", {1: (1, 1), 300: (1, 300)}),
    ],
)
def test_which_tokens_are_coded(name: str, side: str, spans: dict[int, tuple[int, int]]) -> None:
    """As published: KIVI keeps 128 tokens of values always, OScaR all as long as there are 128."""
    codec: Codec = getattr(entry(name), side)
    assert {tokens: codec.coded(tokens) for tokens in spans} == spans


def test_round_trips_take_any_entry() -> None:
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 3, 1, 2, 300, 64)).astype(np.float32)
    keys.flags.writeable = values.flags.writeable = False  # as measure_fidelity gives them
    pair = KeyValueSchemes(Scheme(), Scheme(bits=3))
    trips = round_trips({"a": "kvarn-k4v2", "b": entry("kivi4"), "c": pair, "d": "streaming4"})
    for trip in trips.values():
        hats, stored, once = trip(keys, values), trip.entry.store(keys, values), trip.to_dict()
        assert all(np.array_equal(a.x_hat, b) for a, b in zip(stored, hats, strict=True))
        sealed, kept = (sum(getattr(one, f"{what}_bits") for one in stored) for what in (
            "sealed", "kept",
        ))  # fmt: skip
        assert trip.nbytes == math.ceil((sealed + kept) / 8)
        assert trip.bits_per_element == (sealed + kept) / (2 * keys.size)
        elements = sum(one.sealed_elements for one in stored)
        assert trip.sealed_bits_per_element == once["sealed_bits_per_element"] == sealed / elements
        json.dumps(once)
    assert trips["a"].to_dict()["value_scheme"]["bits"] == 2
    assert trips["c"].schemes is not pair
    assert trips["c"].schemes == pair
    with pytest.raises(AttributeError, match=r"kivi4 is no scheme of NSQ-1; see \.entry"):
        _ = trips["b"].schemes
    only_kept = CacheRoundTrip("kivi2")
    only_kept(keys[..., :5, :])
    assert (only_kept.sealed_bits_per_element, only_kept.bits_per_element) == (0, 16)


def test_a_codec_that_decodes_beyond_float32_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrong(Codec):
        def encode(self, x: NDArray[np.float32]) -> dict[str, Part]:
            return {"x": Part(x, 32)}

        def decode(self, parts: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
            return np.full(shape, np.inf, np.float32)

    with pytest.raises(ValueError, match="would decode to a value beyond float32"):
        Wrong()(np.ones((2, 3)))
    assert Stored(np.ones(1, np.float32), 3, 0, 1, 0).bits_per_element == 3


def test_codecs_are_short() -> None:
    """A rival that needs more than 60 lines is not understood yet."""
    import inspect

    kinds = {type(side) for one in entries().values() for side in (one.key, one.value)}
    assert StaticChannels in kinds
    for kind in kinds:
        lines = inspect.getsource(kind).splitlines()
        code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
        assert len(code) <= 90, kind  # with its documentation
        documentation = sum(
            len((member.__doc__ or "").split("\n"))
            for member in (kind, *vars(kind).values())
            if getattr(member, "__doc__", None) and (member is kind or inspect.isfunction(member))
        )
        assert len(lines) - documentation <= 60, kind


def rows() -> dict[str, list[str]]:
    text = DOCUMENT.read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {re.sub("`", "", row[0]): row[1:] for row in cells}


def test_the_document_has_every_rival_and_its_bits() -> None:
    assert list(rows()) == RIVALS
    for name, row in rows().items():
        one = entry(name)
        sizes = [(512, 64), (512, 128), (4096, 64), (4096, 128)]
        every = name in ("kivi2", "oscar2")
        heads = 8 if any(one in name for one in SHARED_BY_HEADS) else 1
        for (tokens, head_dim), shown in zip(sizes[: 4 if every else 1], row, strict=False):
            total, sealed = one.bits_per_element(tokens, head_dim, heads)
            expected = (
                f"{total:.2f}" if math.isclose(total, sealed) else f"{total:.2f} / {sealed:.2f}"
            )
            assert shown == expected, (name, tokens, head_dim)
        assert row[4:] == [one.source, one.differs or "nothing"]
