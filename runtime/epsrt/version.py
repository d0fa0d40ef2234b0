"""The version of epsrt, as pyproject.toml has it."""

__version__ = "0.1.0"
