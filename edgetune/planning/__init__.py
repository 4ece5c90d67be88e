"""Everything about a training that is known, and checked, before torch is imported: base model, rows, disk space."""
