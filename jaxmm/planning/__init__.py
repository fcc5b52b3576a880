"""What a recipe will ask of chips that are not there: memory, FLOPs, exchanges, and the compiler's estimate of time."""
