"""The speed of an exported model on this machine, and how near decoding comes to the bandwidth of its memory."""
