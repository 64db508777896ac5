"""The command line.

python -m sxe check    the derivation, line by line, and the precision of the loss
python -m sxe plan     what the head would do for inputs of some size
python -m sxe bench    speed and memory, beside the peers that are installed

Each command has a module with its arguments, and what it does with them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from sxe._tools import plan_command
from sxe._tools.bench import command as bench_command
from sxe._tools.check import command as check_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; argv defaults to the process's arguments.

    Returns:
      The exit status: 0 when everything passed, 1 when something did not.

    Raises:
      SystemExit: with status 2 for arguments that do not fit, with status 0 for --help.
    """
    parser = argparse.ArgumentParser(prog="python -m sxe", description="Softmax cross-entropy.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, add_arguments, help_ in (
        ("check", check_command.add_arguments, "measure the derivation, line by line"),
        ("plan", plan_command.add_arguments, "what the head does for inputs of some size"),
        ("bench", bench_command.add_arguments, "measure speed and memory beside others"),
    ):
        add_arguments(commands.add_parser(name, help=help_))
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
