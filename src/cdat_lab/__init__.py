"""The laboratory: races between rules for the learning rate, and verdicts on the paper's claims.

`compare` is the way in from Python, ``cdat`` the command line. A task, a rule or a base optimizer
of one's own joins by `register_task`, `register_contender` and `register_base`.
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
