"""Sets of subjects and prompts, and measures of how well pictures keep both."""
