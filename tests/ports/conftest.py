from __future__ import annotations

collect_ignore_glob = ["*.py"]  # ports, most of them hostile, not tests
