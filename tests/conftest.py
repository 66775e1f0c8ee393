from __future__ import annotations

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

collect_ignore = ["fixtures"]  # scripts that made fixtures need what the tests do not: torch
if sys.version_info < (3, 11):  # for which there is no onnxruntime-genai that runs custom operators
    collect_ignore.append("onnx_export/rewrite/test_genai.py")

# Drawn the same way on every machine: a failure in CI is the failure at home.
settings.register_profile(
    "nsq", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("few", settings.get_profile("nsq"), max_examples=10)
settings.load_profile(os.environ.get("NSQ_TEST_PROFILE", "nsq"))

# What `make quick` leaves out of its files: tests that take a second and more with few examples,
# all instances of one together. It lists those that do, and they belong here.
SLOW = {
    "test_a_port_from_the_text_alone_conforms",
    "test_a_searched_scale_is_not_just_anything",
    "test_a_cache_from_the_text_alone_conforms",
    "test_cases_are_as_declared",
    "test_deterministic",
    "test_engineered_cases",
    "test_every_scheme",
    "test_flags_cite_rules",
    "test_layout_of_memory_does_not_matter",
    "test_least_squares_gain_is_correctly_rounded",
    "test_rank_one_form",
    "test_the_rule_that_a_port_breaks_is_named_first",
    "test_threads_and_slabs_do_not_matter",
    "test_what_is_not_known_is_not_taken_for_something_known",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.originalname in SLOW:
            item.add_marker(pytest.mark.slow)
