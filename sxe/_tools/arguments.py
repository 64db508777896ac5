"""Types of command-line arguments that several commands take, for ``type=`` of argparse."""

import argparse
import math
from pathlib import Path


def size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def output_file(text: str) -> Path:
    """A file that is written at the end, and is refused at the start if that cannot work."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"expected a file in a directory that exists, got {text!r}"
        )
    return Path(text)
