"""Everything that is known before torch is imported: base model, rows, memory, disk."""
