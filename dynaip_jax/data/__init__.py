"""Data sets, in NumPy and PIL: nothing in here imports JAX."""
