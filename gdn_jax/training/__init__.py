"""A small language model of bytes: its text, and the baseline that it has to beat."""
