"""Figures on arrays (extra ``plots``: matplotlib), in colours that the colour-blind can tell."""

from typing import Any

from nsq_ref.extras import extra

with extra("plots", __name__):
    import matplotlib  # noqa: F401  all modules below need it

from nsq_ref.plots.bounds import bound_against_measured, estimate_against_measured, share_of_bound
from nsq_ref.plots.directions import demo_figure, direction_histogram, two_channels
from nsq_ref.plots.frontier import frontier, named_points, pareto_front
from nsq_ref.plots.maps import error_map, outlier_ratio_map, token_channel_map
from nsq_ref.plots.series import bars, error_by_layer, quantile_rows, stacked_rows, sweep
from nsq_ref.plots.style import DIVERGING, SEQUENTIAL, STYLES

__all__ = [
    "DIVERGING", "SEQUENTIAL", "STYLES", "TALK_STYLE", "bars", "bound_against_measured",
    "demo_figure", "direction_histogram", "error_by_layer", "error_map",
    "estimate_against_measured", "frontier", "named_points", "outlier_ratio_map", "pareto_front",
    "quantile_rows", "share_of_bound", "stacked_rows", "sweep", "token_channel_map", "two_channels",
]  # fmt: skip

TALK_STYLE: dict[str, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "figure.figsize": (9.0, 4.0),
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
"""Settings for ``matplotlib.rcParams.update``: figures that can be read from afar."""
