"""Error bounds of NSQ-1, each a theorem of docs/bounds.md; E1 to E10 name them there and here.

Three ways in, by what is known. `a_priori` knows the scheme and the head size. `certificate` knows
what is stored, as a decoder does, and that a conforming encoder stored it. `encoder_bounds` knows
the vectors too, and holds whatever scales were used. They are built from the functions on plain
arrays below, which serve whoever quantizes elsewhere.

Everything is float64 and rounds outwards, and holds for the float32 arithmetic that NSQ-1
prescribes, not for real arithmetic only. What is named ``estimate`` is not a bound.

**direction** here is ``x / norm`` as a real number, where ``norm`` is the float32 of rule N1 or N3
(1 without norm separation), so that ``x = norm * direction`` holds exactly. Balanced norms (N3) are
no lengths: their directions are at most of length 1, and may be much shorter. ``y`` is the
dequantized direction and ``x_hat`` the decoded token, both of rule D1. ``x`` is what rule I1 makes
of the input. Of tokens that are zero, which norm separation decodes to zero, E1 to E4 say nothing.

Keys that were coded with feedback (F1) have codes of something else than their directions: E1 to
E9, and all three ways in, are of keys and values without it. E10 is of those.
"""

from nsq_ref.bounds.attention import (
    estimate_logit_rms,
    logit_error,
    output_error,
    spread,
    total_variation,
)
from nsq_ref.bounds.before_data import APriori, a_priori
from nsq_ref.bounds.certificates import Bounds, certificate, encoder_bounds
from nsq_ref.bounds.direction import direction_error, direction_interval, element_error
from nsq_ref.bounds.feedback import (
    feedback_element_error,
    feedback_gain_error,
    feedback_logit_error,
    feedback_metric_error,
)
from nsq_ref.bounds.intervals import Interval
from nsq_ref.bounds.norm import factor_error, narrowing_interval, norm_interval
from nsq_ref.bounds.token import chord, reconstruction_error, relative_error

__all__ = [
    "APriori", "Bounds", "Interval", "a_priori", "certificate", "chord", "direction_error",
    "direction_interval", "element_error", "encoder_bounds", "estimate_logit_rms", "factor_error",
    "feedback_element_error", "feedback_gain_error", "feedback_logit_error",
    "feedback_metric_error", "logit_error", "narrowing_interval", "norm_interval", "output_error",
    "reconstruction_error", "relative_error", "spread", "total_variation",
]  # fmt: skip
