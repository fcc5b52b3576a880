"""Losses: pure functions of arrays over the global batch."""
