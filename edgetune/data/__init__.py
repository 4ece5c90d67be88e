"""Rows in many formats -> rendered conversations -> token ids and loss masks. No torch here."""
