"""The models: configuration and module of each."""
