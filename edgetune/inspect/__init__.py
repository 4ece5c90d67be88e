"""What is in an exported file, and the self-test of the machine (`edgetune doctor`)."""
