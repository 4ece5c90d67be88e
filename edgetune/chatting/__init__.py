"""A chat in a terminal: the conversation, its commands, line editing and what is shown."""
