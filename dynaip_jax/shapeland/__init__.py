"""Shapeland: a drawn world in which everything is known, its judge, its measures and the models that come with the package."""
