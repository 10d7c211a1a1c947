"""The one error type that neva-hf raises for bad input: files, names, numbers and models that do not fit."""

from __future__ import annotations


class NeVAError(ValueError):
    """Something that the caller gave cannot be used.

    The message says what was wrong, what was expected and what to do. Command-line programs print it in one line.

    Example:

    ```py
    >>> from neva_hf.errors import NeVAError
    >>> issubclass(NeVAError, ValueError)
    True
    ```
    """
