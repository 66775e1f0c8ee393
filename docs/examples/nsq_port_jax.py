"""The paper's scheme nsep+pchan4 in JAX, with blocks and with the gain of rule M2.

nsq check nsq_port_jax.py:encode --decode nsq_port_jax.py:decode

With --attend nsq_port_jax.py:attend, attention too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

# XLA may otherwise keep more bits than a cast to float16 leaves (S3). It reads this when it starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_allow_excess_precision=false"

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nsq_ref import Scheme

jax.config.update("jax_enable_x64", True)  # the norm needs float64 and int64


@partial(jax.jit, static_argnames="gain")
def encode_blocks(x: Array, gain: bool) -> tuple[Array, Array, Array]:
    """Return packed codes, scales and factors of blocks [..., T, D] of float32, with D even."""
    wide = exact(x)
    length = norm(wide)
    # In float64, as XLA takes subnormal float32 for 0 on a CPU; two roundings are as one here.
    direction = divided(wide, exact(length)[..., None]).astype(jnp.float32)  # N2
    peak = jnp.abs(direction).max(axis=-2, keepdims=True)
    scale = divided(peak, jnp.float32(7)).astype(jnp.float16)  # S1
    codes = jnp.clip(jnp.round(divided(direction, scale.astype(jnp.float32))), -7, 7)  # S3 Q1 Q2
    factor = length  # M1
    if gain:
        factor = divided(length, norm(exact(codes * scale.astype(jnp.float32))))  # M2
    nibbles = (codes + 8).astype(jnp.uint8)  # P1
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scale, factor.astype(jnp.float16)


@partial(jax.jit, static_argnames="gain")
def decode_blocks(packed: Array, scale: Array, factor: Array, gain: bool) -> Array:
    """Return ``x_hat`` of blocks (D1)."""
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1)
    nibbles = nibbles.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    y = (nibbles.astype(jnp.float32) - 8) * scale.astype(jnp.float32)
    if not gain:
        y = divided(y, norm(exact(y))[..., None])
    return factor.astype(jnp.float32)[..., None] * y


def divided(x: Array, divisor: Array) -> Array:
    """Return x / divisor, and 0 where the divisor is 0 (N2 Q1 M2 D1).

    The barrier hides that many elements have one divisor, of which XLA would take the reciprocal.
    """
    divisor = jnp.where(divisor == 0, jnp.inf, divisor).astype(x.dtype)
    return x / lax.optimization_barrier(jnp.broadcast_to(divisor, x.shape))


# --- the norm (N1) --------------------------------------------------------------------------------


def parts_of(bits: Array) -> tuple[Array, Array]:
    """Return the mantissas of float32, and the places of their last bits above 2^-149."""
    exponent = bits >> 23 & 255
    mantissa = bits & 0x7FFFFF | jnp.where(exponent > 0, 0x800000, 0)
    return mantissa.astype(jnp.int64), jnp.maximum(exponent, 1).astype(jnp.int64) - 1


def exact(x: Array) -> Array:
    """Return float64 of float32, subnormals too."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    tiny = parts_of(bits)[0].astype(jnp.float64) * 2.0**-149
    tiny = jnp.where(bits < 0, -tiny, tiny)
    return jnp.where(bits >> 23 & 255 == 0, tiny, x.astype(jnp.float64))


def rounded(root: Array) -> Array:
    """Return the bits of float32 of float64 that are not negative, subnormals too."""
    bits = lax.bitcast_convert_type(root.astype(jnp.float32), jnp.int32)
    tiny = jnp.round(jnp.minimum(root, 2.0**-126) * 2.0**149).astype(jnp.int32)
    return jnp.where(root < 2.0**-126, tiny, bits)


def norm(wide: Array) -> Array:
    """Return the correctly rounded norm over the last axis, of float64 that hold float32."""
    root = jnp.sqrt((wide * wide).sum(axis=-1))  # squares are exact, their sum is not
    slack = (wide.shape[-1] + 8) * 2.0**-53
    low, high = rounded(root * (1 - slack)), rounded(root * (1 + slack))
    bits = lax.cond(  # rare: the exact sum decides
        (low < high).any(),
        lambda: jnp.where(low < high, next_if_more(wide, low), low),
        lambda: low,
    )
    return lax.bitcast_convert_type(bits, jnp.float32)


def next_if_more(wide: Array, low: Array) -> Array:
    """Return the bits of a float32, or of that above it if the exact norm is nearer to it.

    Sums of integers have no order: each of 18 limbs of 32 bits is summed over the row, and what
    they come to, less the square of the middle of the two, is followed from the lowest limb up.
    """
    mantissa, place = parts_of(rounded(jnp.abs(wide)))
    middle, middle_place = parts_of(low)

    def add(limb: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        carry, rest = state
        here = digit(mantissa**2, 2 * place + 2, limb).sum(axis=-1) + carry  # units of 2^-300
        here -= digit((2 * middle + 1) ** 2, 2 * middle_place, limb)
        return here >> 32, rest | (here & 0xFFFFFFFF)

    carry, rest = lax.fori_loop(0, 18, add, (jnp.zeros_like(middle), jnp.zeros_like(middle)))
    is_more = (carry >= 0) & ((rest != 0) | (low & 1 == 1))  # a tie goes to the even one
    return low + is_more


def digit(value: Array, place: Array, limb: Any) -> Array:
    """Return 32 bits of ``value * 2^place``, where value has 50 bits at most."""
    shift = place - 32 * limb
    left, right = value << jnp.clip(shift, 0, 31), value >> jnp.clip(-shift, 0, 63)
    return jnp.where(shift >= 32, 0, jnp.where(shift >= 0, left, right) & 0xFFFFFFFF)


# --- blocks (B1), in arrays of few sizes, as XLA compiles for each size anew ----------------------


def power_of_two(size: int) -> int:
    """Return the next power of two, 32 at least."""
    return max(32, 1 << (size - 1).bit_length())


def as_blocks(x: np.ndarray, size: int) -> np.ndarray:
    """Return ``[sequences * blocks, size, D]``, padded with zeros, which change nothing."""
    sequences, tokens, width = x.reshape(-1, *x.shape[-2:]).shape
    count = -(-tokens // size)
    padded = np.zeros((sequences, count * size, width), x.dtype)
    padded[:, :tokens] = x.reshape(sequences, tokens, width)
    sizes = (sequences * count, size, width)
    blocks = np.zeros([power_of_two(one) for one in sizes], x.dtype)
    blocks[: sizes[0], :size, :width] = padded.reshape(sizes)
    return blocks


def as_tokens(blocks: Array, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return what lies in blocks as ``[..., T, D]``."""
    *lead, tokens, width = shape
    count, sequences = -(-tokens // size), int(np.prod(lead))
    kept = np.asarray(blocks)[: sequences * count, :size, :width]
    return kept.reshape(sequences, count * size, width)[:, :tokens].reshape(shape)


# --- the operations -------------------------------------------------------------------------------


def encode(x: Any, scheme: Scheme) -> dict[str, np.ndarray]:
    """Return the stored parts of a NumPy array ``x[..., T, D]``."""
    require_supported(scheme)
    values = np.asarray(x, np.float32)  # I1; exact for float16 and bfloat16
    *lead, tokens, head_dim = values.shape
    if 0 in (tokens, head_dim) or not np.isfinite(values).all():
        raise ValueError("x is not finite, or has no tokens or no channels")  # I2
    size = min(scheme.block_size or tokens, tokens)
    made = encode_blocks(as_blocks(values, size), scheme.magnitude == "gain")
    packed, scale, factor = map(np.asarray, made)
    if not np.isfinite(factor).all():  # a gain of an infinite norm is not a number
        raise ValueError("a norm or gain is beyond its dtype")  # N1 M4
    count = -(-tokens // size)
    return {
        "packed": as_tokens(packed, size, (*lead, tokens, (head_dim + 1) // 2)),
        "scale": as_tokens(scale, 1, (*lead, count, head_dim)),
        "norm": as_tokens(factor[..., None], size, (*lead, tokens, 1))[..., 0],
    }


def decode(parts: Mapping[str, Any], scheme: Scheme, shape: tuple[int, ...]) -> np.ndarray:
    """Return ``x_hat[..., T, D]`` of NumPy arrays."""
    require_supported(scheme)
    size = min(scheme.block_size or shape[-2], shape[-2])
    packed = as_blocks(parts["packed"], size)
    scale = np.zeros((len(packed), 1, 2 * packed.shape[-1]), np.float16)
    stored = parts["scale"].reshape(-1, 1, shape[-1])
    scale[: len(stored), :, : shape[-1]] = stored
    factor = as_blocks(parts["norm"][..., None], size)[..., 0]
    return as_tokens(decode_blocks(packed, scale, factor, scheme.magnitude == "gain"), size, shape)


def attend(
    query: Any, keys: Mapping[str, Any], values: Mapping[str, Any], key_scheme: Scheme,
    value_scheme: Scheme, *, scale: float, causal: bool, softcap: float | None,
    sliding_window: int | None,
) -> Array:  # fmt: skip
    """Return the output ``[heads, queries, D_v]`` (rules A1 to A3)."""
    k, v = decode(keys, key_scheme, keys["shape"]), decode(values, value_scheme, values["shape"])
    return attention(query, k, v, scale, bool(causal), softcap, sliding_window)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def attention(
    query: Array, k: Array, v: Array, scale: float, causal: bool, softcap: float | None,
    sliding_window: int | None,
) -> Array:  # fmt: skip
    """Return the output of decoded keys and values."""
    heads, queries, head_dim = query.shape
    kv_heads, tokens, _ = k.shape
    q = query.reshape(kv_heads, heads // kv_heads, queries, head_dim)  # A1
    scores = jnp.float32(scale) * jnp.einsum("ghqd,gtd->ghqt", q, k, precision="highest")
    if softcap:
        scores = jnp.float32(softcap) * jnp.tanh(scores / jnp.float32(softcap))
    token, position = jnp.arange(tokens), tokens - queries + jnp.arange(queries)[:, None]  # A2
    seen = (token <= position) | (not causal)
    if sliding_window:
        seen &= token > position - sliding_window
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    output = jnp.einsum("ghqt,gtd->ghqd", weights, v, precision="highest")
    return output.reshape(heads, queries, -1)


def require_supported(scheme: Scheme) -> None:
    """Raise for schemes that this example leaves out."""
    known = replace(Scheme(), block_size=scheme.block_size, magnitude=scheme.magnitude)
    if scheme.magnitude == "lsq" or scheme != known:
        raise NotImplementedError(f"{scheme} is not in this example")
