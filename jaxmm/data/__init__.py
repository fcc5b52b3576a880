"""Sources of pictures and words, decoding, augmentation, and batches that depend on the seed and the step only."""
