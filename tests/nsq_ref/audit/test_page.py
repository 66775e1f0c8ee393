"""The page holds all of an audit by itself. tests/javascript opens it in a browser."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import zlib

import numpy as np
import pytest

from nsq_ref.audit import Audit, audit, html_page
from nsq_ref.audit.pictures import HeatMap, heat_map, palette, png
from nsq_ref.dtypes import Array


def an_audit(layers: int = 3, heads: int = 2, width: int = 8) -> Audit:
    x = np.random.default_rng(0).standard_normal((layers, 1, heads, 40, width)).astype(np.float32)
    x[layers - 1, 0, 1, :, 3] *= 40
    return audit(x, x, schemes=["naive4", "streaming4"])


class Elements(html.parser.HTMLParser):
    """What is open at the end, what is fetched, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.data: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.data.append(data)


def test_a_page_needs_nothing_else() -> None:
    page = html_page(an_audit(), 'kv <of> & a "model"')
    elements = Elements(page)
    assert elements.open == []
    assert elements.fetched
    assert all(one.startswith("data:image/png;base64,") for one in elements.fetched)
    assert "://" not in page
    assert "<h1>kv &lt;of&gt; &amp; a &quot;model&quot;</h1>" in page
    assert "$" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    assert "prefers-color-scheme: dark" in page


def test_maps_hold_the_figures() -> None:
    found = an_audit()
    maps = [json.loads(one) for one in Elements(html_page(found)).data if one.startswith("{")]
    for layer, row in enumerate(maps[0]["values"]):
        np.testing.assert_allclose(row, found.layers[layer].key.outlier_ratio, rtol=0.01)
    peaks = np.array(maps[2]["values"]).reshape(3, 2, 8)
    assert np.unravel_index(peaks.argmax(), peaks.shape) == (2, 1, 3)
    assert maps[2]["group"] == 8


def test_layers_of_several_shapes() -> None:
    random = np.random.default_rng(1)
    shapes = [(1, 2, 20, 8), (1, 3, 30, 16)]
    layers = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    found = audit(layers, layers, schemes=["naive4"])
    maps = [json.loads(one) for one in Elements(html_page(found)).data if one.startswith("{")]
    assert [value is None for value in maps[0]["values"][0]] == [False, False, True]
    assert len(maps[2]["values"][0]) == 3 * 16


def test_neighbours_of_many_channels_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.ones((5, 1, 2, 2, 64), np.float32)
    wide[3, 0, 1, :, 50] = 9
    found = audit(wide, wide, schemes=["naive4"])
    for most, channel in ((640, 64 + 50), (639, 32 + 25), (320, 32 + 25), (161, 16 + 12)):
        monkeypatch.setattr("nsq_ref.audit.page.MOST_CELLS", most)
        data = [json.loads(one) for one in Elements(html_page(found)).data if one.startswith("{")]
        peaks = np.array(data[2]["values"])
        assert peaks.size <= most
        assert np.unravel_index(peaks.argmax(), peaks.shape) == (3, channel)


def decoded(data: bytes) -> tuple[Array, Array]:
    """Colours and levels of a PNG of ours, by its specification."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size], "big") == zlib.crc32(
            kind + content
        )
        chunks[kind] = content
        at += 12 + size
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3), lines[:, 1:]


def test_pictures() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (5, 9)).astype(np.uint8)
    colors, read = decoded(png(levels))
    np.testing.assert_array_equal(read, levels)
    np.testing.assert_array_equal(colors[:255], palette())
    brightness = palette() @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(brightness) >= -0.5).all()  # so that a print in grey shows the same


def test_colours_follow_values() -> None:
    values = np.array([[0.01, 0.1, 1.0, 10.0, np.nan]])
    one = HeatMap("bias", "head", [4], values, 0.1, 10.0, logarithmic=True)
    assert one.levels().tolist() == [[0, 0, 127, 254, 255]]
    figure = heat_map("bias", one)
    assert "bias, at most 10, layer 4, head 3" in figure
    (picture,) = re.findall(r'base64,([^"]*)', figure)[:1]
    np.testing.assert_array_equal(decoded(base64.b64decode(picture))[1], one.levels())
