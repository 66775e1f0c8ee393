"""The family of schemes: one frozen dataclass, the paper's names, and what each stores."""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import numpy.typing as npt

from nsq_ref.arrays import as_integer
from nsq_ref.dtypes import DTYPES, FLOAT_DTYPES, FloatName
from nsq_ref.profiles import ProfileName, profile_fields, profile_names, wants_feedback

__all__ = [
    "FLOAT_DTYPES", "PARTS", "SPEC_VERSION", "Cut", "Field", "FloatName", "KeyValueSchemes", "Part",
    "Scheme", "scheme_names",
]  # fmt: skip

SPEC_VERSION = "NSQ-1"

SchemeName = Literal[
    "naive2", "naive3", "naive4", "naive8",
    "nsep2", "nsep3", "nsep4", "nsep8",
    "pchan2", "pchan3", "pchan4", "pchan8",
    "outlier2", "outlier3", "outlier4", "outlier8",
    "nsep+out2", "nsep+out3", "nsep+out4", "nsep+out8",
    "nsep+pchan2", "nsep+pchan3", "nsep+pchan4", "nsep+pchan8",
    "streaming2", "streaming3", "streaming4", "streaming8",
]  # fmt: skip
PairName = Literal["KIVI-K2V4", "nsep+KIVI", "nsep+KIVI-K2V4"] | ProfileName

_FAMILIES: dict[str, dict[str, Any]] = {
    "naive": {"separate_norm": False, "axis": "token"},
    "nsep": {"separate_norm": True, "axis": "token"},
    "pchan": {"separate_norm": False, "axis": "channel"},
    "outlier": {"separate_norm": False, "axis": "token", "outlier_channels": 4},
    "nsep+out": {"separate_norm": True, "axis": "token", "outlier_channels": 4},
    "nsep+pchan": {"separate_norm": True, "axis": "channel"},
    "streaming": {"symmetric": False, "magnitude": "lsq", "block_size": 128, "sink_tokens": 1},
}
# At two bits a range that reaches to the extremes wastes codes: docs/fidelity.md has what it costs.
_EXCEPTIONS: dict[str, dict[str, Any]] = {"streaming2": {"scale_rule": "search"}}
_SINGLE = re.compile(r"(?P<family>[a-z+]+)(?P<bits>[2348])")
_PAIR = re.compile(r"(?P<norm>nsep\+)?KIVI(-K(?P<key>[2348])V(?P<value>[2348]))?")


def scheme_names() -> list[SchemeName]:
    """Return every name that stands for one scheme, in the paper's order.

    Returns
    -------
    list of str
        Names that `Scheme.named` takes and that give a single `Scheme`.

    Examples
    --------
    >>> scheme_names()[:4]
    ['naive2', 'naive3', 'naive4', 'naive8']
    """
    return list(get_args(SchemeName))


# What may be stored, in the order in which operators and ports take it.
PARTS = ("packed", "scale", "norm", "zero", "outlier_index", "outliers", "sinks")


class Part(NamedTuple):
    """How one of `PARTS` is stored; see `Scheme.parts`."""

    rows: Literal["tokens", "blocks", "sinks"]  # what each of its rows belongs to
    columns: tuple[int, ...]
    dtype: np.dtype[Any]


class Field(NamedTuple):
    """Shape and dtype of one stored array, the leading axes left out."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Cut(NamedTuple):
    """How many tokens of a growing sequence lie where; see `Scheme.cut`."""

    sinks: int
    sealed: int  # in full blocks
    tail: int


class KeyValueSchemes(NamedTuple):
    """The scheme of the keys and the scheme of the values, where a name stands for both.

    Nothing changes one, so that threads may share it.
    """

    key: Scheme
    value: Scheme


@dataclass(frozen=True)
class Scheme:
    """How vectors ``x[..., T, D]`` are coded; the defaults are the paper's ``nsep+pchan4``.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    bits : {4, 2, 3, 8}
        Width of a code.
    separate_norm : bool
        Store the norm of each token and code its direction (rules N1, N2); otherwise the
        vector itself is coded.
    axis : {"channel", "token"}
        What one scale belongs to: a channel of a block of tokens, or a token (S1, S2).
    symmetric : bool
        Codes around zero (S1), or from a stored ``zero`` upwards (S2).
    scale_rule : {"range", "search"}
        Scale from the full range, or from the best of six shrunken ranges (S4).
    norm_rule : {"plain", "balanced"}
        Norm of a token as it is (N1), or with the channels of its block brought to one size where
        that keeps directions closer together (N3): for keys with outlier channels.
    magnitude : {"norm", "gain", "lsq"}
        The stored factor of a token: its norm (M1), the norm over the length of the
        dequantized direction (M2), or the least-squares factor (M3).
    block_size : int or None
        Tokens that share per-channel scales; None is one block for the whole sequence (B1).
    sink_tokens : int
        First tokens of a sequence that are kept unquantized (K1).
    outlier_channels : int
        Channels of each block that are kept in float16 (O1).
    scale_dtype, norm_dtype : {"float16", "bfloat16", "float32"}
        Dtypes in which scales and zeros, and norms or gains, are stored (S3, M4).

    Integers may be NumPy's, or 0-d arrays and tensors; they are kept as Python's.

    Raises
    ------
    ValueError
        For a value outside those above, and for options that would have no effect together.

    Examples
    --------
    >>> Scheme() == Scheme.named("nsep+pchan4")
    True
    >>> Scheme.named("streaming3").bits_per_element(tokens=4096, head_dim=128)
    3.382049560546875
    """

    bits: int = 4
    separate_norm: bool = True
    axis: Literal["channel", "token"] = "channel"
    symmetric: bool = True
    scale_rule: Literal["range", "search"] = "range"
    norm_rule: Literal["plain", "balanced"] = "plain"
    magnitude: Literal["norm", "gain", "lsq"] = "norm"
    block_size: int | None = None
    sink_tokens: int = 0
    outlier_channels: int = 0
    scale_dtype: FloatName = "float16"
    norm_dtype: FloatName = "float16"

    def __post_init__(self) -> None:
        for name in ("bits", "block_size", "sink_tokens", "outlier_channels"):
            with contextlib.suppress(TypeError):  # of what is no integer, more is said below
                object.__setattr__(self, name, as_integer(name, getattr(self, name)))
        choices: dict[str, tuple[Any, ...]] = {
            "bits": (2, 3, 4, 8),
            "separate_norm": (True, False),
            "axis": ("channel", "token"),
            "symmetric": (True, False),
            "scale_rule": ("range", "search"),
            "norm_rule": ("plain", "balanced"),
            "magnitude": ("norm", "gain", "lsq"),
            "scale_dtype": tuple(FLOAT_DTYPES),
            "norm_dtype": tuple(FLOAT_DTYPES),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            # 1 == True and 4.0 == 4, but neither is what a reader of the stored scheme expects.
            if not any(type(value) is type(choice) and value == choice for choice in allowed):
                options = ", ".join(repr(choice) for choice in allowed)
                raise ValueError(f"{name}={value!r} is not supported; choose one of {options}")
        for name, least in (("sink_tokens", 0), ("outlier_channels", 0), ("block_size", 1)):
            value = getattr(self, name)
            if name == "block_size" and value is None:
                continue
            if type(value) is not int or value < least:
                raise ValueError(
                    f"{name}={value!r} is not supported; give an integer of at least {least}"
                    + (" or None for one block" if name == "block_size" else "")
                )
        if not self.separate_norm:
            for name in ("norm_rule", "magnitude", "norm_dtype"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect with separate_norm=False, "
                        f"which stores no norm; leave {name} out or set separate_norm=True"
                    )
        if self.norm_rule == "balanced":
            if self.axis != "channel":
                raise ValueError(
                    "norm_rule='balanced' is of channels that have scales of their own, and with "
                    "axis='token' none has; set axis='channel' or norm_rule='plain'"
                )
            if self.magnitude == "norm":
                raise ValueError(
                    "norm_rule='balanced' makes norms that are no lengths, and magnitude='norm' "
                    "stores a length; set magnitude='gain' or 'lsq', or norm_rule='plain'"
                )

    @overload
    @classmethod
    def named(cls, name: SchemeName) -> Scheme: ...
    @overload
    @classmethod
    def named(cls, name: PairName) -> KeyValueSchemes: ...
    @overload
    @classmethod
    def named(cls, name: str) -> Scheme | KeyValueSchemes: ...
    @classmethod
    def named(cls, name: str) -> Scheme | KeyValueSchemes:
        """Return the scheme, or the pair for keys and values, that a name of the paper means.

        Parameters
        ----------
        name : str
            A name of `scheme_names`; or one of `profile_names`, or ``KIVI-K2V4`` and ``nsep+KIVI``
            (any two widths), which code keys and values differently.

        Returns
        -------
        Scheme or KeyValueSchemes
            A pair only for profiles and the names that contain ``KIVI``. That a profile is made for
            feedback is in its name alone: who makes schemes of it gives the feedback himself.

        Raises
        ------
        ValueError
            For any other name.

        Examples
        --------
        >>> Scheme.named("naive4").axis
        'token'
        >>> Scheme.named("streaming3").scale_rule, Scheme.named("streaming2").scale_rule
        ('range', 'search')
        >>> key, value = Scheme.named("KIVI-K2V4")
        >>> key.bits, value.bits
        (2, 4)
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string such as 'nsep+pchan4', got {name!r}")
        if (pair := _PAIR.fullmatch(name)) is not None:
            family = _FAMILIES["nsep+pchan" if pair["norm"] else "pchan"]
            return KeyValueSchemes(
                key=cls(bits=int(pair["key"] or 2), **family),
                value=cls(bits=int(pair["value"] or 4), **family),
            )
        if name in profile_names():
            key, value = profile_fields(name)
            return KeyValueSchemes(key=cls(**key), value=cls(**value))
        single = _SINGLE.fullmatch(name)
        if single is None or single["family"] not in _FAMILIES:
            raise ValueError(
                f"unknown scheme name {name!r}; known are {', '.join(_FAMILIES)}, each followed "
                f"by 2, 3, 4 or 8, and KIVI-K2V4, nsep+KIVI, {', '.join(profile_names())}"
            )
        own = _FAMILIES[single["family"]] | _EXCEPTIONS.get(name, {})
        return cls(bits=int(single["bits"]), **own)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scheme:
        """Build a scheme from `to_dict`'s result; every field must be there, and no other.

        Raises
        ------
        ValueError
            For a missing, an unknown or an unsupported field.

        Examples
        --------
        >>> Scheme.from_dict(Scheme(bits=3).to_dict()).bits
        3
        """
        if not isinstance(values, dict) or set(values) != set(_DEFAULTS):
            got = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"a scheme has the fields {sorted(_DEFAULTS)}, got {got}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values, ready for JSON.

        Examples
        --------
        >>> Scheme().to_dict()["axis"]
        'channel'
        """
        return asdict(self)

    @property
    def code_range(self) -> tuple[int, int]:
        """The least and the greatest code (Q2; S2 when asymmetric).

        Examples
        --------
        >>> Scheme().code_range, Scheme(symmetric=False).code_range
        ((-7, 7), (0, 15))
        """
        if self.symmetric:
            greatest = 2 ** (self.bits - 1) - 1
            return -greatest, greatest
        return 0, 2**self.bits - 1

    @property
    def code_offset(self) -> int:
        """What is added to a code before it is packed (P1).

        Examples
        --------
        >>> Scheme().code_offset, Scheme(symmetric=False).code_offset
        (8, 0)
        """
        return 2 ** (self.bits - 1) if self.symmetric else 0

    def parts(self, head_dim: int, dtype: npt.DTypeLike | None = None) -> dict[str, Part]:
        """Return how each of `PARTS` that the scheme has is stored, however many tokens there are.

        Takes what `layout` takes, and refuses what it refuses.

        Examples
        --------
        >>> Scheme().parts(head_dim=64)["scale"]
        Part(rows='blocks', columns=(64,), dtype=dtype('float16'))
        """
        head_dim = as_integer("head_dim", head_dim, least=0)
        scales, norms = FLOAT_DTYPES[self.scale_dtype], FLOAT_DTYPES[self.norm_dtype]
        by_channel = self.axis == "channel"
        scale = Part("blocks", (head_dim,), scales) if by_channel else Part("tokens", (1,), scales)
        parts = {"packed": Part("tokens", (row_bytes(head_dim, self.bits),), DTYPES["uint8"])}
        if self.separate_norm:
            parts["norm"] = Part("tokens", (), norms)
        parts["scale"] = scale
        if not self.symmetric:
            parts["zero"] = scale
        if self.outlier_channels:
            kept = (min(self.outlier_channels, head_dim),)
            parts["outlier_index"] = Part("blocks", kept, DTYPES["int32"])
            parts["outliers"] = Part("tokens", kept, DTYPES["float16"])
        if self.sink_tokens:
            kind = np.dtype(np.float32 if dtype is None else dtype)
            parts["sinks"] = Part("sinks", (head_dim,), kind)
        return parts

    def layout(
        self, tokens: int, head_dim: int, dtype: npt.DTypeLike | None = None
    ) -> dict[str, Field]:
        """Return every array that is stored for one sequence of one head.

        Parameters
        ----------
        tokens, head_dim : int
            T and D of ``x[..., T, D]``.
        dtype : numpy dtype, optional
            Dtype of the input, in which sink tokens are kept; float32 by default.

        Returns
        -------
        dict of str to Field
            Name to shape and dtype, the leading axes of ``x`` left out.

        Raises
        ------
        TypeError, ValueError
            For what is no integer, or is negative.

        Examples
        --------
        >>> Scheme().layout(tokens=10, head_dim=64)["packed"].shape
        (10, 32)
        """
        tokens = as_integer("tokens", tokens, least=0)
        coded = max(tokens - self.sink_tokens, 0)
        blocks = -(-coded // self.tokens_per_block(coded))
        rows = {"tokens": coded, "blocks": blocks, "sinks": tokens - coded}
        return {
            name: Field((rows[part.rows], *part.columns), part.dtype)
            for name, part in self.parts(head_dim, dtype).items()
        }

    def tokens_per_block(self, coded: int) -> int:
        """Return the block size, at most all ``coded`` tokens (B1) and at least 1.

        Examples
        --------
        >>> Scheme().tokens_per_block(500), Scheme(block_size=64).tokens_per_block(500)
        (500, 64)
        """
        coded = as_integer("coded", coded, least=0)
        return max(min(self.block_size or coded, coded), 1)

    def cut(self, length: int) -> Cut:
        """Cut a growing sequence, as a cache holds it: sinks, full blocks, tail (K1, B1).

        Without a ``block_size`` no block is ever full.

        Parameters
        ----------
        length : int
            Tokens so far.

        Returns
        -------
        Cut
            Tokens that are sinks, tokens of full blocks, and tokens behind them. They add up to
            ``length``.

        Raises
        ------
        TypeError, ValueError
            For what is no integer, or is negative.

        Examples
        --------
        >>> Scheme(block_size=64, sink_tokens=1).cut(200)
        Cut(sinks=1, sealed=192, tail=7)
        """
        length = as_integer("length", length, least=0)
        sinks = min(self.sink_tokens, length)
        behind = length - sinks
        tail = behind % self.block_size if self.block_size else behind
        return Cut(sinks, behind - tail, tail)

    def bits_per_element(
        self, tokens: int, head_dim: int, dtype: npt.DTypeLike | None = None
    ) -> float:
        """Return the stored bits over the elements of ``x``: codes, scales, norms, all of it.

        Parameters
        ----------
        tokens, head_dim : int
            T and D of ``x[..., T, D]``.
        dtype : numpy dtype, optional
            Dtype of the input, in which sink tokens are kept; float32 by default.

        Returns
        -------
        float
            Bits an element. float16 without quantization has 16.

        Raises
        ------
        TypeError, ValueError
            For what is no integer, or is below 1.

        Examples
        --------
        >>> Scheme.named("nsep+pchan4").bits_per_element(tokens=4096, head_dim=128)
        4.12890625
        """
        tokens = as_integer("tokens", tokens, least=1)
        head_dim = as_integer("head_dim", head_dim, least=1)
        stored = self.layout(tokens, head_dim, dtype).values()
        size = sum(int(np.prod(field.shape)) * field.dtype.itemsize for field in stored)
        return 8 * size / (tokens * head_dim)


def as_scheme(name: str, scheme: Any) -> Scheme:
    """Take a scheme, or a name that stands for one, and no pair; ``name`` is the argument's.

    Examples
    --------
    >>> as_scheme("key", "streaming4").block_size
    128
    """
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, KeyValueSchemes):
        raise TypeError(f"{name} is a pair for keys and values; pass its .key or its .value")
    if not isinstance(scheme, str):
        raise TypeError(
            f"{name} must be a Scheme or a name such as 'nsep+pchan4', got {scheme!r:.80}"
        )
    named = Scheme.named(scheme)
    if isinstance(named, KeyValueSchemes):
        beside = ", with feedback for the keys" if wants_feedback(scheme) else ""
        raise ValueError(
            f"{name}={scheme!r} names a pair for keys and values; pass "
            f"Scheme.named({scheme!r}).key, or .value{beside}"
        )
    return named


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Scheme)}


def row_bytes(head_dim: int, bits: int) -> int:
    """Return the bytes of one packed token (rule P1): 3 bits are a row of 2 and a row of 1.

    Examples
    --------
    >>> row_bytes(128, 4), row_bytes(5, 4), row_bytes(9, 3)
    (64, 3, 5)
    """
    widths = (2, 1) if bits == 3 else (bits,)
    return sum(-(-head_dim * width // 8) for width in widths)
