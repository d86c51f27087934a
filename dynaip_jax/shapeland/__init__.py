"""Shapeland: a drawn world in which everything about a picture is known, its judge, its measures and the models in the package."""
