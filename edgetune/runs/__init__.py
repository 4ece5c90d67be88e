"""The run directory: layout, manifest, statuses, lock."""
