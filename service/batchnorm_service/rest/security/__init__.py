"""Access control: who calls (`guard`), what the call needs (`rules`), and how failures are slowed down (`failures`)."""

from .failures import Failures, WrongTokenError
from .guard import Guard
from .rules import Rules, check_layer, is_public, needed_scope, needs, require

__all__ = [
    "Failures",
    "Guard",
    "Rules",
    "WrongTokenError",
    "check_layer",
    "is_public",
    "needed_scope",
    "needs",
    "require",
]
