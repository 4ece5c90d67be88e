"""File work that survives crashes and slow disks: hashing while reading, writing by region, renames that hold Ctrl-C back."""
