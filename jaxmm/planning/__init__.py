"""Ahead-of-time plans of a recipe on a target topology: memory, FLOPs, collectives and estimated time."""
