"""Use a trained model: classify, caption, answer, match and search."""
