"""From a run and its options to one request to the converters, and its execution."""
