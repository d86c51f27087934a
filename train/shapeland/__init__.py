"""Training the models of Shapeland from nothing."""
