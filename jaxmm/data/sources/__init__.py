"""Data sources: one file per kind, and the registry that opens a source by its name."""
