"""Serve exported files over HTTP to clients of OpenAI, Anthropic and Ollama.

A request is read by a dialect (`dialects/`), becomes a `Conversation` or plain token ids, and is answered by the engine
of a loaded file. `application.py` holds the table of routes.
"""
