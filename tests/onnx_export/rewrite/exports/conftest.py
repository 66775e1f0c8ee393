"""The scripts that made the fixtures need the exporters, which tests do not have."""

collect_ignore = ["make"]
