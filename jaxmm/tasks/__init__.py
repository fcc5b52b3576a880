"""Objectives: one file each, a frozen dataclass of pure functions that the one train step knows as a `Task`."""
