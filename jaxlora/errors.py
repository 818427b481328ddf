"""The one exception for mistakes a user can fix."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message names the file, line or flag and what to do about it.

    Scripts print the message alone and exit with code 2; library code may catch it.
    """
