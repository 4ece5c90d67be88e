"""The dialects of the server, one file each: request fields, and replies."""
