from __future__ import annotations

from hypothesis import HealthCheck, settings

collect_ignore = ["fixtures"]  # scripts that made fixtures need what the tests do not: torch

# Drawn the same way on every machine: a failure in CI is the failure at home.
settings.register_profile(
    "nsq", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nsq")
