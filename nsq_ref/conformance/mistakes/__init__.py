"""Mistakes that implementers are known to make, each one decision away from the specification.

Each module holds those of some rules: the wrong functions, and entries with what a report says of
them. `diagnose` puts them into a `Reference` until it gives what a port gave, and the tests of the
kit make ports of them. A mistake that an entry cannot express is a missing function of `spec`.
"""

from nsq_ref.conformance.mistakes.attending import ATTENTION
from nsq_ref.conformance.mistakes.balanced import BALANCED
from nsq_ref.conformance.mistakes.caches import BLOCKS, CACHES
from nsq_ref.conformance.mistakes.codes import CODES
from nsq_ref.conformance.mistakes.decoding import DECODING
from nsq_ref.conformance.mistakes.factors import FACTORS
from nsq_ref.conformance.mistakes.feedback import FED_BACK, GAINS_SEEN, SEARCHING
from nsq_ref.conformance.mistakes.feedback_caches import FED_CACHES
from nsq_ref.conformance.mistakes.norms import DIRECTIONS, NORMS
from nsq_ref.conformance.mistakes.outliers import OUTLIERS
from nsq_ref.conformance.mistakes.packed import PACKED
from nsq_ref.conformance.mistakes.reference import Mistake, Reference
from nsq_ref.conformance.mistakes.scales import NARROWING, RANGES
from nsq_ref.conformance.mistakes.tiles import TILES

__all__ = ["MISTAKES", "Mistake", "Reference"]

# In the order of computation: of mistakes that explain equally much, a diagnosis names the first.
_ALL = (
    *NORMS, *BALANCED, *DIRECTIONS, *RANGES, *NARROWING, *SEARCHING, *CODES, *FED_BACK, *PACKED,
    *FACTORS, *GAINS_SEEN, *OUTLIERS, *BLOCKS, *CACHES, *FED_CACHES, *DECODING, *ATTENTION, *TILES,
)  # fmt: skip
MISTAKES = {mistake.name: mistake for mistake in _ALL}
