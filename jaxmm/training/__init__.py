"""Train a model: state, optimizer, step, loop."""
