"""What the networks are built of: norms and projections, attention and its kernels, positions, injection."""
