"""Models on the Hugging Face Hub: references, pulling, the cache, what is listed and removed."""

from .explain import HubError
from .pull import Pulled, find_pulled, pull, resolve_hub
from .reference import Reference, is_reference, parse_reference

__all__ = [
    "HubError",
    "Pulled",
    "Reference",
    "find_pulled",
    "is_reference",
    "parse_reference",
    "pull",
    "resolve_hub",
]
