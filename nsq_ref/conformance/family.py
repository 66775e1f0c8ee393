"""The schemes that the kit knows by name: the paper's, and variants for what these leave out."""

from __future__ import annotations

from typing import Any

from nsq_ref.scheme import KeyValueSchemes, Scheme, scheme_names

__all__ = ["FAMILY", "as_scheme", "scheme_named"]

# Every named scheme has float16 scales and norms or least-squares gains; only streaming2 searches.
VARIANTS = {
    "gain": Scheme(magnitude="gain"),
    "lsq": Scheme(magnitude="lsq"),
    "bfloat16": Scheme(scale_dtype="bfloat16", norm_dtype="bfloat16"),
    "float32": Scheme(scale_dtype="float32", norm_dtype="float32"),
    "lsq-float32": Scheme(magnitude="lsq", scale_dtype="float32", norm_dtype="float32"),
    "asymmetric": Scheme(symmetric=False),
    "asymmetric-float32": Scheme(symmetric=False, scale_dtype="float32", norm_dtype="float32"),
    "search": Scheme(scale_rule="search"),
    "outliers": Scheme(outlier_channels=4),
    "blocks": Scheme(block_size=16, sink_tokens=2),
}

FAMILY: dict[str, Scheme] = {name: Scheme.named(name) for name in scheme_names()} | {
    f"nsep+pchan4-{name}": scheme for name, scheme in VARIANTS.items()
}


def scheme_named(name: str) -> Scheme:
    """Return a scheme of the family.

    Parameters
    ----------
    name : str
        A name of `nsq_ref.scheme_names`, or one such as ``nsep+pchan4-gain``.

    Raises
    ------
    ValueError
        For any other name, pairs for keys and values included.

    Examples
    --------
    >>> scheme_named("nsep+pchan4-gain").magnitude
    'gain'
    """
    if name in FAMILY:
        return FAMILY[name]
    variants = ", ".join(f"nsep+pchan4-{one}" for one in VARIANTS)
    if "KIVI" in name:
        raise ValueError(f"{name} is a pair for keys and values; check one after the other")
    raise ValueError(
        f"unknown scheme name {name!r}; known are those of `nsq info` (nsep+pchan4, naive4, ...), "
        f"and {variants}"
    )


def as_scheme(name: str, scheme: Any) -> Scheme:
    """Take a scheme, or the name of one of the family; ``name`` is the argument's.

    Raises
    ------
    TypeError
        For what is neither, and for a pair of schemes.
    ValueError
        For an unknown name.

    Examples
    --------
    >>> as_scheme("scheme", "nsep+pchan4-lsq").magnitude
    'lsq'
    """
    if isinstance(scheme, KeyValueSchemes):
        raise TypeError(f"{name} is a pair for keys and values; pass its .key or its .value")
    if not isinstance(scheme, Scheme | str):
        raise TypeError(f"{name} must be a Scheme or a name, got {scheme!r:.80}")
    return scheme_named(scheme) if isinstance(scheme, str) else scheme
