"""The schemes that the kit knows by name: the paper's, and variants for what these leave out."""

from __future__ import annotations

from nsq_ref.scheme import Scheme, as_scheme, scheme_names

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
    "balanced": Scheme(norm_rule="balanced", magnitude="gain"),
    "balanced-blocks": Scheme(
        symmetric=False, norm_rule="balanced", magnitude="lsq", block_size=16, sink_tokens=2
    ),
}  # fmt: skip

FAMILY: dict[str, Scheme] = {name: Scheme.named(name) for name in scheme_names()} | {
    f"nsep+pchan4-{name}": scheme for name, scheme in VARIANTS.items()
}


def scheme_named(name: str) -> Scheme:
    """Return a scheme of the family; ValueError for a name of none, as of a pair.

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


def family_scheme(name: str, scheme: Scheme | str) -> Scheme:
    """Take a scheme as `nsq_ref.scheme.as_scheme` does, or the name of one of the family.

    Examples
    --------
    >>> family_scheme("scheme", "nsep+pchan4-lsq").magnitude
    'lsq'
    """
    return scheme_named(scheme) if isinstance(scheme, str) else as_scheme(name, scheme)
