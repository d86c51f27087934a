"""DynaIP (arXiv 2512.09814) in JAX/Flax: subject personalisation for multimodal diffusion transformers."""
