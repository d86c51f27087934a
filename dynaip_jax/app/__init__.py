"""The `dynaip` command."""
