"""Proof that an exported file is the model that was trained: metrics, contract, task, gate, report. Needs no torch."""
