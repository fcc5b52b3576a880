"""From a configuration to a trained model: state, optimizer, step, checkpoints, loop."""
