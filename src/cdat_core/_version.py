"""The version of the distribution; pyproject.toml and all four packages take it from here."""

__version__ = "0.1.0"
