"""Serve a model: a web page, and JSON endpoints whose requests are computed in batches."""
