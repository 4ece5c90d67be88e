"""From rows in many formats to rendered conversations, token ids and loss masks, without torch."""
