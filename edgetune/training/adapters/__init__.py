"""The PEFT methods that can be trained, one module a family."""
