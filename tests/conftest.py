from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

collect_ignore = ["fixtures"]  # scripts that made fixtures need what the tests do not: torch

# Drawn the same way on every machine: a failure in CI is the failure at home.
settings.register_profile(
    "nsq", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("few", settings.get_profile("nsq"), max_examples=10)
settings.load_profile(os.environ.get("NSQ_TEST_PROFILE", "nsq"))
