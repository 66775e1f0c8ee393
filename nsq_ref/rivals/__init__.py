"""Methods of others on the same arrays, each checked against its published code or formula.

One registry holds them beside our schemes, so that an evaluation asks every entry the same way:
`entry` by name, `Entry.key` and `Entry.value` for what would be read back and the bits stored.
docs/rivals.md lists them with their sources.

Examples
--------
>>> import numpy as np
>>> x = np.random.default_rng(0).standard_normal((2, 512, 64), dtype=np.float32)
>>> for name in ("nsep+pchan4", "q4_0", "turboquant4"):
...     stored = entry(name).key(x)
...     print(name, stored.bits_per_element, round(float(np.std(stored.x_hat - x)), 2))
nsep+pchan4 4.28125 0.13
q4_0 4.5 0.09
turboquant4 4.25 0.09
"""

from nsq_ref.rivals.codec import Codec, NormFirst, Part, SchemeCodec, Stored, Unquantized
from nsq_ref.rivals.registry import Entry, entries, entry, entry_of

__all__ = [
    "Codec", "Entry", "NormFirst", "Part", "SchemeCodec", "Stored", "Unquantized", "entries",
    "entry", "entry_of",
]  # fmt: skip
