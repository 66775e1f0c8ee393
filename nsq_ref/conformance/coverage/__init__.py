"""What the cases of a scheme show: every known mistake, in every dtype of input.

A mistake that no case shows has a reason why none can (`reasons`); `matrix` finds the cases.
"""

from nsq_ref.conformance.coverage.matrix import Cell, answered, coverage, shows
from nsq_ref.conformance.coverage.reasons import REASONS, REFUSALS, Reason, reason

__all__ = [
    "REASONS", "REFUSALS", "Cell", "Reason", "answered", "coverage", "reason", "shows",
]  # fmt: skip
