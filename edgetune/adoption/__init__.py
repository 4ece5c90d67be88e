"""Adapters trained elsewhere: what their trainers left, the base that they belong to, and a run directory for them."""
