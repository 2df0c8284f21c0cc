"""Keep the libraries underneath quiet, and their complaints to one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log lines below errors inside; what matters is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def complaining(must: str) -> Iterator[None]:
    """Turn whatever a library underneath raises inside into one line.

    Args:
        must: What must hold, for the message.

    Raises:
        ValueError: With the first line of what the library says.
    """
    try:
        yield
    except Exception as error:  # they raise classes of their own that share no base
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{must}; it says: {first_line[:200]}") from error
