"""Options of attention, as tests draw them."""

from __future__ import annotations

import hypothesis.strategies as st

options = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([None, 0.0, -1.0, 2.5]),
        "softcap": st.sampled_from([None, 0.5, 30.0]),
    }
)
masks = st.sampled_from(
    [
        {},
        {"causal": False},
        {"sliding_window": 1},
        {"sliding_window": 2},
        {"sliding_window": 7},
        {"sliding_window": 1000},
    ]
)
seeds = st.integers(0, 2**32 - 1)
