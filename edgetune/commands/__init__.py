"""One thin module a verb; `edgetune.cli` imports the one that is asked for."""
