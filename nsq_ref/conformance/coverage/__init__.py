"""What the cases of a scheme show: every known mistake, in every dtype of input.

A mistake that no case shows has a reason why none can (`reasons`); `matrix` finds the cases.
"""

from nsq_ref.conformance.coverage.matrix import Cell, answered, coverage, shows
from nsq_ref.conformance.coverage.reasons import OPEN, REASONS, REFUSALS, Reason, reason

__all__ = [
    "OPEN", "REASONS", "REFUSALS", "Cell", "Reason", "answered", "coverage", "reason", "shows",
]  # fmt: skip
