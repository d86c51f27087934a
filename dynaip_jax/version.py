"""The version, apart so that `setup.py` and `dynaip --version` read it without importing anything heavy."""

__version__ = "0.1.0"
