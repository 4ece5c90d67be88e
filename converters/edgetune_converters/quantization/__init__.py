"""Storage types: recipes, overrides, importance matrices, encoding, delta survival."""
