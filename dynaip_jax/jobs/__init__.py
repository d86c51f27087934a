"""Lists of generations: read, checked, and drawn so that a list that was stopped is gone on with."""
