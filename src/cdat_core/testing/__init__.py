"""A conformance kit: what an adapter to another framework owes the core, as checks to run.

Each check raises an AssertionError that says which law failed and by how much, or returns None. The
checks look at values, so they run eagerly, in a test. The core owns no randomness: you bring the
vectors, best with random entries.
"""

from cdat_core.testing._tuners import check_tuner
from cdat_core.testing._vectors import check_hvp, check_oracle, check_space

__all__ = ["check_hvp", "check_oracle", "check_space", "check_tuner"]
