"""Building blocks: attention, the transformer stack, embeddings, pooling."""
