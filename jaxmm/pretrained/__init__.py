"""Published weights: formats, tables of parameter names, files, tokenizers, and warm starts."""
