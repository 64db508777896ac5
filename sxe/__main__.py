"""The command line: ``python -m sxe``.

python -m sxe check    check the derivation, line by line, and the precision of the losses
python -m sxe plan     show what the head does for given sizes, without running it
python -m sxe bench    measure speed and memory, compared with other libraries

Each command is a module. It adds its arguments to a parser and runs the command.
"""

import argparse
import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Sequence

from sxe._tools import plan_command
from sxe._tools.arguments import PROGRAM, examples_text
from sxe._tools.bench import command as bench_command
from sxe._tools.check import command as check_command

INDENT = " " * 7  # of the overview
COMMANDS = {"check": check_command, "plan": plan_command, "bench": bench_command}
SUBJECT = (
    "Softmax cross-entropy, entropy and KL divergence for JAX, with closed-form gradients.\n"
    "To use the losses: import sxe. These commands check, plan and measure them:"
)
DOCUMENTATION = (
    f"Options of a command: {PROGRAM} <command> --help\n"
    "Documentation: README.md and sxe/docs/ in the source of sxe; in Python, help(sxe)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Without arguments, print an overview of the commands.

    Args:
      argv: the arguments; None takes those of the process.

    Returns:
      The exit status: 0 when everything passed, 1 when something did not.

    Raises:
      SystemExit: with status 2 for invalid arguments, with status 0 for --help and --version.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=SUBJECT.partition("\n")[0],
        epilog=DOCUMENTATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="command", title="commands")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(
                name,
                help=command.SUMMARY,
                epilog=examples_text(command.EXAMPLES),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        print(_overview())
        return 0
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _overview() -> str:
    """One sentence and one example for each command."""
    parts = [f"{_version()}\n{SUBJECT}"]
    for name, command in COMMANDS.items():
        example, _ = command.EXAMPLES[0]
        text = textwrap.fill(
            command.SUMMARY, 80, initial_indent=f"{name:7}", subsequent_indent=INDENT
        )
        parts.append(f"{text}\n{INDENT}$ {example}")
    return "\n\n".join([*parts, DOCUMENTATION])


def _version() -> str:
    try:
        return f"sxe {importlib.metadata.version('sxe')}"
    except importlib.metadata.PackageNotFoundError:  # the source is on the path, not installed
        return "sxe, run from its source"


if __name__ == "__main__":
    sys.exit(main())
