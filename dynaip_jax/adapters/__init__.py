"""The adapter: CLIP features of reference images -> an `ImagePrompt`. It knows a backbone only by depths, heads, head size."""
