"""The error of this package."""

from __future__ import annotations


class FamilyError(ValueError):
    """A config that no family here can carry; the message names the field, the value and what would be right."""
