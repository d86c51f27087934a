"""Statistics and tables of evaluations."""
