"""Line searches with an ask-and-tell interface: the caller evaluates the loss and loops."""

from cdat_core.linesearch._backtracking import BacktrackingState, backtracking
from cdat_core.linesearch._base import LineSearch, LineSearchState
from cdat_core.linesearch._interpolation import Bracket, Point
from cdat_core.linesearch._zoom import ZoomState, zoom

__all__ = [
    "BacktrackingState",
    "Bracket",
    "LineSearch",
    "LineSearchState",
    "Point",
    "ZoomState",
    "backtracking",
    "zoom",
]
