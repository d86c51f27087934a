"""How programs run: where arrays live, how programs are compiled, how weights lie in memory."""
