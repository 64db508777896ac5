"""What the command lines share: types for argparse's ``type=``, and the examples below --help."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "python -m sxe"
Examples = Sequence[tuple[str, str]]  # command lines, each with a sentence about it


def examples_text(examples: Examples) -> str:
    """The epilog of a command's help."""
    return "\n".join(["examples:", *(f"  $ {line}\n      {text}" for line, text in examples)])


def size(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def output_file(text: str) -> Path:
    """A file in an existing directory. It is written at the end, but an error shows at once."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"expected a file in a directory that exists, got {text!r}"
        )
    return Path(text)
