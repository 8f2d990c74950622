"""Access control: who calls, what that needs, failures that are slowed down, and web pages of other sites."""

from .failures import Failures, WrongTokenError
from .guard import Guard
from .rules import Rules, check_layer, is_public, needed_scope, needs, require
from .sites import refuse_other_sites

__all__ = [
    "Failures",
    "Guard",
    "Rules",
    "WrongTokenError",
    "check_layer",
    "is_public",
    "needed_scope",
    "needs",
    "refuse_other_sites",
    "require",
]
