"""The command line: ``cdat``."""

from cdat_lab.cli._app import app

__all__ = ["app"]
