"""PEFT adapters on disk, as the change of each base tensor."""
