"""Heat maps and lines as inline SVG, with nothing but NumPy: a page needs no other library."""

from __future__ import annotations

import base64
import html
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from nsq_ref.dtypes import Array, Float64

__all__ = ["HeatMap", "Lines", "heat_map", "line_chart", "png"]

# cividis, which can be told without red and green, at 17 places.
COLORS = (
    "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 "
    "8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838"
)  # fmt: skip
# Okabe and Ito's; the first is that of the text.
LINES = ("currentColor", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
DASHES = ("", "9 3", "2 3", "9 3 2 3", "14 4", "5 5", "1 5")
Lines: TypeAlias = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Of each scheme what was measured in each layer, and what was predicted; or nothing."""

WIDTH, LEFT, TOP = 640, 44, 8
MISSING = 255  # the colour of what there is not: transparent


def palette() -> Array:
    """Return 255 colours, uint8 ``[255, 3]``, from dark to light.

    Examples
    --------
    >>> palette()[[0, -1]].tolist()
    [[0, 34, 78], [254, 232, 56]]
    """
    anchors = np.array([list(bytes.fromhex(one)) for one in COLORS.split()], np.float64)
    at = np.linspace(0, len(anchors) - 1, MISSING)
    columns = [np.interp(at, np.arange(len(anchors)), column) for column in anchors.T]
    colors: Array = np.stack(columns, axis=1).round().astype(np.uint8)
    return colors


def png(levels: Array) -> bytes:
    r"""Return a PNG of levels, uint8 ``[rows, columns]``: 0 to 254 of the palette, 255 for nothing.

    Examples
    --------
    >>> png(np.zeros((2, 3), np.uint8))[:8]
    b'\x89PNG\r\n\x1a\n'
    """
    rows, columns = levels.shape
    lines = np.zeros((rows, columns + 1), np.uint8)  # each begins with its filter, none
    lines[:, 1:] = levels
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    colors = palette().tobytes() + bytes(3)
    parts = [(b"IHDR", header), (b"PLTE", colors), (b"tRNS", b"\xff" * MISSING + b"\x00")]
    parts += [(b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A picture of layers by heads or channels.

    Attributes
    ----------
    title, columns : str
        What it shows, and what its columns are.
    layers : sequence of int
        The numbers of the rows.
    values : float64 array, [layers, columns]
        NaN where there is nothing.
    least, greatest : float
        Where the colours begin and end; what is beyond has the colour of the end.
    logarithmic : bool
    group : int
        Columns that belong together, such as the channels of a head; 0 for none.
    """

    title: str
    columns: str
    layers: Sequence[int]
    values: Float64
    least: float
    greatest: float
    logarithmic: bool = False
    group: int = 0

    def levels(self) -> Array:
        """Return the colour of each cell, uint8.

        Examples
        --------
        >>> one = HeatMap("bias", "head", [0], np.array([[0.0, 1.0, np.nan, 9.0]]), 0.0, 2.0)
        >>> one.levels().tolist()
        [[0, 127, 255, 254]]
        """
        low, high, values = self.least, self.greatest, self.values
        missing = np.isnan(values)
        values = np.clip(np.where(missing, low, values), low, high)
        if self.logarithmic:
            low, high, values = math.log(low), math.log(high), np.log(values)
        share = (values - low) / (high - low)
        return np.where(missing, MISSING, (share * (MISSING - 1)).round()).astype(np.uint8)


def heat_map(name: str, one: HeatMap) -> str:
    """Return a figure of HTML; its cells tell their values to the page's script.

    Examples
    --------
    >>> figure = heat_map("ratio", HeatMap("ratio", "head", [0], np.ones((1, 2)), 1.0, 10.0))
    >>> figure.startswith("<figure"), figure.count("<image")
    (True, 2)
    """
    rows, columns = one.values.shape
    row_height = max(4.0, min(14.0, 360 / rows, 10 * WIDTH / max(columns, 1)))
    if columns <= 64:
        row_height = max(8.0, min(16.0, 420 / rows))
    height = rows * row_height
    base = TOP + height
    parts = [_image(one.levels(), LEFT, TOP, WIDTH, height)]
    step = _step(rows, height / 14)
    for row in range(0, rows, step):
        y = TOP + (row + 0.5) * row_height
        parts.append(_text(LEFT - 6, y + 4, one.layers[row], "end"))
    # Marks between what belongs together, or at columns.
    group = one.group or 1
    count = max(columns // group, 1)
    each = _step(count, WIDTH / 40)
    for column in range(0, count, each):
        x = LEFT + (column + 0.5) * WIDTH / count
        parts.append(_text(x, base + 14, column, "middle"))
        if one.group and column:
            at = LEFT + column * WIDTH / count
            parts.append(f'<path class="rule" d="M{at:.1f} {TOP}V{base:.1f}"/>')
    parts.append(_text(LEFT + WIDTH / 2, base + 30, one.columns, "middle"))
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(11 {TOP + height / 2:.1f})'
        ' rotate(-90)">layer</text>'
    )
    bar = LEFT + WIDTH - 200
    parts.append(_image(np.arange(MISSING, dtype=np.uint8)[None], bar + 40, base + 40, 120, 8))
    parts.append(_text(bar + 34, base + 48, _number(one.least), "end"))
    parts.append(_text(bar + 166, base + 48, f"{_number(one.greatest)}", "start"))
    frame = f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{height:.1f}"/>'
    most = np.nanmax(one.values) if not np.isnan(one.values).all() else math.nan
    at = np.argwhere(one.values == most)
    where = ""
    if len(at):
        where = f", layer {one.layers[at[0][0]]}, {_column(int(at[0][1]), one)}"
    said = f"{one.title}, at most {_number(float(most))}{where}"
    data = {
        "values": [[_short(value) for value in row] for row in one.values.tolist()],
        "layers": list(one.layers), "group": one.group,
        "box": [LEFT, TOP, WIDTH, round(height, 1)],
    }  # fmt: skip
    encoded = json.dumps(data, separators=(",", ":"))
    return (
        f'<figure class="map" id="{name}"><figcaption>{html.escape(said)}</figcaption>'
        f'<svg viewBox="0 0 {LEFT + WIDTH + 10} {base + 56:.0f}" role="img" '
        f'aria-label="{html.escape(said)}">{"".join(parts)}{frame}</svg>'
        f'<script type="application/json">{encoded}</script></figure>'
    )


def line_chart(
    name: str,
    title: str,
    layers: Sequence[int],
    lines: Lines,
    limit: float | None = None,
) -> str:
    """Return a figure of HTML with a line for each scheme, measured, and marks where predicted.

    A limit is a line across.

    Examples
    --------
    >>> figure = line_chart("error", "error", [0, 1], {"naive4": ([1.0, 2.0], [1.1, 2.0])})
    >>> figure.count("<polyline"), figure.count('<circle class="predicted"')
    (1, 2)
    """
    positive = [v for pair in lines.values() for side in pair for v in side if v > 0]
    positive += [] if limit is None else [limit]
    low, high = (min(positive), max(positive)) if positive else (0.5, 1.0)
    low, high = low / 1.2, max(high * 1.2, low * 1.5)
    height, right = 260.0, 120
    width = WIDTH - right

    def x_of(row: int) -> float:
        return LEFT + (row + 0.5) * width / len(layers)

    def y_of(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return TOP + height * (1 - share)

    parts = []
    for tick in _ticks(low, high):
        y = y_of(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{LEFT + width}"/>')
        parts.append(_text(LEFT - 6, y + 4, _number(tick), "end"))
    for row in range(0, len(layers), _step(len(layers), width / 30)):
        parts.append(_text(x_of(row), TOP + height + 14, layers[row], "middle"))
    if limit is not None:
        parts.append(f'<path class="limit" d="M{LEFT} {y_of(limit):.1f}h{width}"/>')
    ends = []
    for index, (scheme, (measured, predicted)) in enumerate(lines.items()):
        color, dash = LINES[index % len(LINES)], DASHES[index % len(DASHES)]
        points = " ".join(f"{x_of(i):.1f},{y_of(v):.1f}" for i, v in enumerate(measured))
        parts.append(
            f'<polyline style="stroke:{color}" stroke-dasharray="{dash}" points="{points}"/>'
        )
        parts += [
            f'<circle class="{kind}" style="{paint}:{color}" cx="{x_of(i):.1f}" cy="{y_of(v):.1f}" '
            f'r="{radius}"><title>{html.escape(scheme)}, layer {layers[i]}: {_number(v)} {kind}'
            "</title></circle>"
            for kind, paint, radius, side in (
                ("measured", "fill", 2, measured), ("predicted", "stroke", 4, predicted)
            )
            for i, v in enumerate(side)
        ]  # fmt: skip
        ends.append((y_of(measured[-1]), scheme, color, dash))
    at = float(TOP)
    for y, scheme, color, dash in sorted(ends):
        at = max(y, at + 15)
        parts.append(
            f'<path class="key" style="stroke:{color}" stroke-dasharray="{dash}" '
            f'd="M{LEFT + width + 4} {at:.1f}h22"/>'
            + _text(LEFT + width + 30, at + 4, scheme, "start")
        )
    parts.append(_text(LEFT + width / 2, TOP + height + 30, "layer", "middle"))
    frame = f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width}" height="{height:.0f}"/>'
    return (
        f'<figure class="chart" id="{name}"><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {LEFT + WIDTH + 10} {TOP + height + 36:.0f}" role="img" '
        f'aria-label="{html.escape(title)}">{frame}{"".join(parts)}</svg>'
        "</figure>"
    )


def _image(levels: Array, x: float, y: float, width: float, height: float) -> str:
    data = base64.b64encode(png(levels)).decode()
    return (
        f'<image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
    )


def _text(x: float, y: float, text: object, anchor: str) -> str:
    return (
        f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(str(text))}</text>"
    )


def _column(column: int, one: HeatMap) -> str:
    if one.group:
        return f"head {column // one.group}, channel {column % one.group}"
    return f"head {column}"


def _step(count: int, room: float) -> int:
    """Return by how many to count, so that no more marks stand than there is room for."""
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500):
        if count / step <= max(room, 1):
            return step
    return count


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [times * 10.0**decade for decade in decades for times in (1, 2, 5)]
    ticks = [tick for tick in every if low <= tick <= high]
    return ticks if len(ticks) <= 8 else [tick for tick in ticks if math.log10(tick) % 1 == 0]


def _number(value: float) -> str:
    return "constant" if value >= 1e6 else f"{value:.3g}"


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.3g}")
