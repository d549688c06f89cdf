"""Hypothesis profiles of the whole suite.

``ci`` (the default) draws the same examples on every run; ``HYPOTHESIS_PROFILE=dev`` explores new
ones and keeps what it finds in the example database.
"""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
