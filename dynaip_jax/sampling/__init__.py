"""From a prompt and reference pictures to pictures."""
