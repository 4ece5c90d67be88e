"""`python -m edgetune`, the same as the command `edgetune`."""

from edgetune.cli import main

main()
