"""Where an artifact came from: hashes, receipts, metadata."""
