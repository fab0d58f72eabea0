"""Every option of the project, declared once, and the words that they are given in."""

from .answering import GenerateOptions
from .loading import LoadOptions
from .opt import Opt, declared, defaults, make_options, takes
from .serving import ServeOptions
from .shared import DEFAULT_GAMMA, DEFAULT_MAX_KLD, POLICY_OPTIONS

__all__ = [
    "DEFAULT_GAMMA",
    "DEFAULT_MAX_KLD",
    "POLICY_OPTIONS",
    "GenerateOptions",
    "LoadOptions",
    "Opt",
    "ServeOptions",
    "declared",
    "defaults",
    "make_options",
    "takes",
]
