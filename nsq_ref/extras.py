"""Parts of this package that are installed on demand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str, user: str) -> Iterator[None]:
    """Import within it what an extra of this package brings.

    Raises
    ------
    ModuleNotFoundError
        Where it is not installed, with the command that installs it.

    Examples
    --------
    >>> with extra("plots", "nsq_ref.plots"):
    ...     import no_such_module
    Traceback (most recent call last):
    ModuleNotFoundError: nsq_ref.plots needs no_such_module; pip install 'nsq-ref[plots]' ...
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{user} needs {error.name}; pip install 'nsq-ref[{name}]' brings all it uses",
            name=error.name,
        ) from None
