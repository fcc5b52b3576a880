"""Read and write files of tensors: safetensors, PyTorch, npz; find them on the hub."""
