"""Files on disk: how they are written."""
