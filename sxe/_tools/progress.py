"""The progress of long work, shown on standard error if that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str], object]
WIDTH = 78  # of the line of text, which the next one overwrites


def silent(text: str) -> None:
    """Show nothing."""


@contextmanager
def progress(total: int) -> Iterator[Show]:
    """Yield a function that is called with a short text at the start of each of `total` steps.

    A bar of tqdm shows the steps where tqdm is installed, as with the extra ``sxe[bench]``. One
    line of text shows them elsewhere. Nothing remains on the terminal at the end.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        started = 0

        def show_text(text: str) -> None:
            nonlocal started
            started += 1
            _overwrite(f"[{started}/{total}] {text} ...")

        try:
            yield show_text
        finally:
            _overwrite("", end="\r")
        return
    with tqdm(total=total, leave=False, bar_format="{desc} {bar} {n}/{total}") as bar:

        def show_bar(text: str) -> None:
            if bar.desc:  # the step before has ended
                bar.update()
            bar.set_description_str(text)

        yield show_bar


def _overwrite(text: str, end: str = "") -> None:
    print(f"\r{text[:WIDTH]:{WIDTH}}", end=end, file=sys.stderr, flush=True)
