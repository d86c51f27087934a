"""Will it fit, and how fast could it be: programs compiled for devices that are not here."""
