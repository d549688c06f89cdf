"""A conformance kit: checks of what the core requires of an adapter to another framework.

Each check returns None, or raises an AssertionError that says which law failed and by how much. The
checks read values, so run them eagerly, in a test. The core generates no random numbers: you supply
the vectors, preferably with random entries.
"""

from cdat_core.testing._tuners import check_tuner
from cdat_core.testing._vectors import check_hvp, check_oracle, check_space

__all__ = ["check_hvp", "check_oracle", "check_space", "check_tuner"]
