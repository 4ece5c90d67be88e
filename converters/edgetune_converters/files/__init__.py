"""File work that survives crashes: hash while reading, write by region, rename with Ctrl-C held back."""
