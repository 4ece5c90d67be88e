"""Base checkpoint plus adapter to GGUF in one streaming pass. Needs no torch, prints nothing, knows no command line."""
