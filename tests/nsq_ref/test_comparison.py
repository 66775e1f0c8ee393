from __future__ import annotations

import numpy as np
import pytest

from nsq_ref import KeyValueSchemes, Scheme, dequantize, quantize
from nsq_ref.comparison import DEMO_SCHEMES, CacheRoundTrip, round_trips


def caches(seed: int, tokens: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (3, 1, 2, tokens, 8)
    return rng.standard_normal(shape).astype(np.float32), rng.random(shape).astype(np.float32)


@pytest.mark.parametrize("name", [*DEMO_SCHEMES, "KIVI-K2V4"])
def test_counts_add_up_over_caches(name: str) -> None:
    schemes = Scheme.named(name)
    pair = KeyValueSchemes(schemes, schemes) if isinstance(schemes, Scheme) else schemes
    trip = CacheRoundTrip(schemes)
    error, size, nbytes = np.zeros((2, 3)), np.zeros((2, 3)), 0
    for seed, tokens in ((0, 40), (1, 7)):
        both = caches(seed, tokens)
        returned = trip(*both)
        for side, (x, scheme, x_hat) in enumerate(zip(both, pair, returned, strict=True)):
            quantized = quantize(x, scheme)
            assert x_hat.tobytes() == dequantize(quantized).tobytes()
            nbytes += quantized.nbytes
            for layer in range(3):
                error[side, layer] += np.sum((x[layer].astype(np.float64) - x_hat[layer]) ** 2)
                size[side, layer] += np.sum(x[layer].astype(np.float64) ** 2)
    expected = np.sqrt(error / size)
    assert trip.nbytes == nbytes
    assert trip.bits_per_element == 8 * nbytes / (2 * 3 * 2 * 47 * 8)
    assert trip.float16_nbytes == 2 * 2 * 3 * 2 * 47 * 8
    assert np.allclose(trip.key_error, expected[0], rtol=1e-6)
    assert np.allclose(trip.value_error, expected[1], rtol=1e-6)
    assert trip.total_error("key") == pytest.approx(
        np.sqrt(error[0].sum() / size[0].sum()), rel=1e-6
    )
    side, layer, worst = trip.worst_layer()
    assert worst == pytest.approx(expected.max(), rel=1e-6)
    assert expected[["key", "value"].index(side), layer] == expected.max()


def test_keys_alone_and_zeros() -> None:
    trip = CacheRoundTrip(Scheme())
    keys = np.zeros((2, 4, 8), np.float32)
    keys_hat, _ = trip(keys)
    assert not keys_hat.any()
    assert trip.key_error.tolist() == [0, 0]
    assert trip.value_error.tolist() == []
    assert trip.total_error("key") == 0
    assert trip.to_dict()["value_error"] is None


def test_each_scheme_has_its_own_count() -> None:
    trips = round_trips()
    assert list(trips) == list(DEMO_SCHEMES)
    trips["naive4"](*caches(0))
    assert trips["naive4"].nbytes > 0
    assert trips["nsep4"].nbytes == 0
