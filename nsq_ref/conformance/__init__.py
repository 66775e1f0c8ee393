"""The conformance kit: tell any implementer which rule they broke, where and why."""
