"""The lab: compare learning-rate rules with each other, and test the paper's claims.

`compare` is the entry point from Python, ``cdat`` the command line. Add your own task, rule or base
optimizer with `register_task`, `register_contender` or `register_base`.
"""

from cdat_core import __version__
from cdat_lab.bases import Base
from cdat_lab.comparison import compare
from cdat_lab.contenders import Contender
from cdat_lab.registry import register_base, register_contender, register_task
from cdat_lab.tasks import Task

__all__ = [
    "Base",
    "Contender",
    "Task",
    "__version__",
    "compare",
    "register_base",
    "register_contender",
    "register_task",
]
