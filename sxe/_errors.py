"""Errors that say of which argument they are, so that a caller can name it in other words.

A command line does: of the argument ``chunk_size`` it says ``--chunk-size``.
"""

from typing import Any


class ArgumentError(Exception):
    """An error about one argument. Its text is "argument: message".

    Attributes:
      argument: the argument's name.
      message: what was expected, what came, and what to do.
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument, self.message = argument, message

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is copied and unpickled from its text alone.
        return type(self), (self.argument, self.message)


class ArgumentTypeError(ArgumentError, TypeError):
    """The argument has a type or dtype that does not fit."""


class ArgumentValueError(ArgumentError, ValueError):
    """The argument has a value or shape that does not fit."""


def unserved(needed: str) -> ArgumentValueError:
    """The error that says what the kernels for GPUs would need."""
    return ArgumentValueError("implementation", f"expected for 'mosaic_gpu' {needed}; use 'xla'")
