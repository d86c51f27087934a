"""Pictures in and out, in NumPy and PIL: nothing in here imports JAX."""
