"""The version: this line is its only source (pyproject.toml reads it)."""

__version__ = "0.1.0"
