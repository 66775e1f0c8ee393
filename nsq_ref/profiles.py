"""Profiles: one name for keys and values at a budget of bits.

What a name means are two schemes; that it is made for feedback of the keys (F1) is in the name
alone. So who is given a name asks here, and refuses it where there is no feedback.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

__all__ = [
    "ProfileName", "feedback_is_missing", "profile_fields", "profile_names", "require_feedback",
    "wants_feedback",
]  # fmt: skip

ProfileName = Literal[
    "fast-4.5",
    "small-4.5", "small-3.5", "small-3", "small-2.5",
    "best-4.5", "best-3.5", "best-3", "best-2.5",
]  # fmt: skip


class _Family(NamedTuple):
    """What the profiles of one name have, whatever their budget."""

    key_rule: Literal["range", "search"]
    value_rule: Literal["range", "search"]
    norm_rule: Literal["plain", "balanced"]  # of keys: values have no outlier channels
    wants_feedback: bool = False


_FAMILIES = {
    "fast": _Family("range", "range", "plain"),
    "small": _Family("range", "search", "balanced"),
    "best": _Family("search", "search", "balanced", wants_feedback=True),
}
# Bits of keys and of values by the bits an element that they take together, with 64 channels.
_BUDGETS = {"4.5": (4, 4), "3.5": (3, 3), "3": (3, 2), "2.5": (2, 2)}
# Of both sides; the rest is as a Scheme has it by default.
_FIELDS: dict[str, Any] = {
    "symmetric": False, "magnitude": "gain", "block_size": 128, "sink_tokens": 1,
}  # fmt: skip


def profile_names() -> list[ProfileName]:
    """Return every name that stands for keys and values at a budget of bits.

    Returns
    -------
    list of str
        Names that `Scheme.named` takes and that give a pair: ``fast`` is sealed soonest, ``small``
        needs no calibration, either, and ``best`` is made for feedback of the keys (F1).
        The number is bits an element, keys and values together, with 64 channels.

    Examples
    --------
    >>> [name for name in profile_names() if name.endswith("-4.5")]
    ['fast-4.5', 'small-4.5', 'best-4.5']
    """
    return list(get_args(ProfileName))


def wants_feedback(name: Any) -> bool:
    """Tell whether it is the name of a profile whose keys are made for feedback (F1).

    The schemes of such a profile do not tell: those of ``best-2.5`` are ``small-2.5``.

    Examples
    --------
    >>> [name for name in profile_names() if wants_feedback(name)]
    ['best-4.5', 'best-3.5', 'best-3', 'best-2.5']
    """
    known = isinstance(name, str) and name in profile_names()
    return known and _FAMILIES[name.partition("-")[0]].wants_feedback


def feedback_is_missing(name: str) -> ValueError:
    """Return the error of who gives the name of a profile that `wants_feedback`, and no feedback.

    Examples
    --------
    >>> print(feedback_is_missing("best-3"))
    best-3 is made for feedback of the keys, and there is none: write it with ...
    """
    other = name.replace("best", "small")
    return ValueError(
        f"{name} is made for feedback of the keys, and there is none: write it with `nsq onnx "
        f"calibrate MODEL --text TEXT -o FILE` and give it (--feedback FILE, key_feedback), or "
        f"take {other}, which needs none"
    )


def require_feedback(name: Any, feedback: Any) -> None:
    """Refuse the name of a profile that `wants_feedback` where there is none.

    Examples
    --------
    >>> require_feedback("small-3", None)
    """
    if feedback is None and wants_feedback(name):
        raise feedback_is_missing(name)


def profile_fields(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the schemes of keys and of values that a profile means.

    Examples
    --------
    >>> profile_fields("small-3")[1]["scale_rule"]
    'search'
    """
    family, _, budget = name.partition("-")
    own = _FAMILIES[family]
    key, value = (
        {"bits": bits, **_FIELDS, "scale_rule": "search" if bits == 2 else rule}
        for bits, rule in zip(_BUDGETS[budget], (own.key_rule, own.value_rule), strict=True)
    )
    return key | {"norm_rule": own.norm_rule}, value
