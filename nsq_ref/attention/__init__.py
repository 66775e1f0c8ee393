"""Attention over decoded keys and values in float64, and over stored ones without decoding them.

`attend` is the reference (rules A1, A2): plain NumPy that reads like the formula.
`attend_quantized` takes keys and values as they are stored, and `tolerance` says how far it, or any
other kernel in float32, may be from the reference (rule A3).
"""

from nsq_ref.attention.options import require_options as require_options
from nsq_ref.attention.reference import Attention, attend
from nsq_ref.attention.stored import Piece, PreparedPiece, attend_quantized, prepare
from nsq_ref.attention.tolerance import reach, tolerance

__all__ = [
    "Attention", "Piece", "PreparedPiece", "attend", "attend_quantized", "prepare", "reach",
    "tolerance",
]  # fmt: skip
