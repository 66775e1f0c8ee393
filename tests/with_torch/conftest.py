from __future__ import annotations

collect_ignore_glob = ["test_*"]  # `make test-torch` names them; the other tests need no torch
