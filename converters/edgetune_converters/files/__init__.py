"""File work that survives crashes: hash while writing, write by region, rename atomically."""
