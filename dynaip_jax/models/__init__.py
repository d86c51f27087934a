"""The frozen networks, in Flax Linen: FLUX MM-DiT, T5, CLIP, KL-VAE. Each file: config with presets, then the modules."""
