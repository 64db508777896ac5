"""Errors that carry the name of an argument, so that a caller can refer to it by another name.

For an error about ``chunk_size``, the command line names ``--chunk-size``.
"""

from typing import Any


class ArgumentError(Exception):
    """An error about one argument. Its text is "argument: message".

    Attributes:
      argument: the name of the argument.
      message: what was expected, what came, and what to do.
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument, self.message = argument, message

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, an exception is copied and unpickled from its text only.
        return type(self), (self.argument, self.message)


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a wrong type or dtype."""


class ArgumentValueError(ArgumentError, ValueError):
    """An argument has a wrong value or shape."""


def unserved(needed: str) -> ArgumentValueError:
    """The error for a call that the row kernels for GPUs do not support."""
    return ArgumentValueError("implementation", f"'mosaic_gpu' needs {needed}; use 'xla'")
