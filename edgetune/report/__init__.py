"""The report: one HTML page about a run and its exported files. It loads nothing from the network."""
