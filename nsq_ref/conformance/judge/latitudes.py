"""What may differ from the specification, where it is allowed by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

LATITUDES = {
    "norm-ulp": "norms and gains within so many float32 steps of the right one",
    "tie-ulp": "codes one off whose quotient is so many float32 steps from a tie, but not on it",
    "gain-folding": "decoded values within so many float32 steps, as from (norm / ||y||) * y",
    "flush-subnormals": "0 in place of subnormal numbers",
}


@dataclass(frozen=True)
class Steps:
    """By how many float32 steps values may be off before they are used, as a diagnosis supposes."""

    norm: int = 0  # one number for all channels of a token
    direction: int = 0
    scale: int = 0  # before it is narrowed
    quotient: int = 0
    gain: int = 0  # before it is narrowed
    decoded: int = 0


@dataclass(frozen=True)
class Latitudes:
    """What may differ from the specification, in steps of float32: see `LATITUDES`.

    Examples
    --------
    >>> Latitudes.parse(["norm-ulp=1", "flush-subnormals"])
    Latitudes(norm_ulp=1, tie_ulp=0, gain_folding=0, flush_subnormals=True)
    """

    norm_ulp: int = 0
    tie_ulp: int = 0
    gain_folding: int = 0
    flush_subnormals: bool = False
    supposed: Steps = field(default=Steps(), repr=False)  # never by name

    @classmethod
    def parse(cls, names: list[str] | tuple[str, ...]) -> Latitudes:
        """Read names such as ``norm-ulp=1`` and ``gain-folding=2ulp``; ValueError for others."""
        values: dict[str, Any] = {}
        for text in names:
            name, equals, number = text.partition("=")
            if name not in LATITUDES:
                raise ValueError(f"latitude {text!r} is unknown; there are {', '.join(LATITUDES)}")
            if name.replace("-", "_") in values:
                raise ValueError(f"latitude {name} is given twice; give it once")
            if name == "flush-subnormals":
                if equals:
                    raise ValueError(f"latitude {text!r} takes no number; write {name}")
                values["flush_subnormals"] = True
                continue
            found = re.fullmatch(r"([1-9][0-9]{0,5})(ulp)?", number)
            if found is None:
                raise ValueError(f"latitude {text!r} needs a number from 1 on, as in {name}=1")
            values[name.replace("-", "_")] = int(found[1])
        return cls(**values)
