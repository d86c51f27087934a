"""How networks make one system: one object a backbone family."""
