"""The command line of ``python -m sxe bench``. Only running it needs the extra ``sxe[bench]``."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from sxe._tools.arguments import output_file, positive, size
from sxe._tools.bench import contestants, measure
from sxe._tools.bench.problem import CONFIDENT, Problem, gpu_problems, standard_problems

SUITE_ROUNDS = 5
SUITE_CHUNKS = (1024, 2048, 4096, 8192)  # of the first head of a GPU's suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time sxe, optax, what else is installed of tokamax, jax-cce and PyTorch (with CUDA also "
        "liger-kernel and cut-cross-entropy), and the floor "
        "(for logits, to write x + 1, or for the value to read x; for the head, its matmuls), in "
        "interleaved rounds, and hold every result against float64. A ratio is that of the "
        "medians, with the quartiles of the rounds' own; ! marks a peer whose result is wrong. "
        "Several sizes are a sweep. Needs the extra sxe[bench]."
    )
    parser.add_argument("--rows", type=size, nargs="+", help="N (default: the standard problems)")
    parser.add_argument("--classes", type=size, nargs="+", help="K")
    parser.add_argument("--hidden", type=size, nargs="+", help="D: the head; without it, logits")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        nargs="+",
        help="default: float32",
    )
    parser.add_argument("--dense", action="store_true", help="targets [N, K] instead of labels")
    parser.add_argument(
        "--confident",
        type=float,
        default=CONFIDENT,
        metavar="SHARE",
        help="of the rows, in which the label leads by 20, as in a trained model "
        f"(default: {CONFIDENT})",
    )
    parser.add_argument(
        "--counting",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the rows, scattered, that count: the head runs no chunk without them, and is "
        "measured with all rows beside it (default: 1)",
    )
    parser.add_argument("--only", choices=("value", "both"), help="the value, or with the gradient")
    parser.add_argument("--peers", nargs="*", help="among those installed (default: all of them)")
    parser.add_argument(
        "--chunk-size",
        type=size,
        nargs="+",
        help="of the head: measure sxe once more with each of these",
    )
    parser.add_argument(
        "--suite",
        action="store_true",
        help="the value and gradient of the standard problems of this device, most important "
        "first, in a table each; --json is written after each of them",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="SECONDS",
        help="for the suite: start no problem that would end later, judging by the last one",
    )
    parser.add_argument("--calls", action="store_true", help="what a call costs, on 8 x 10 logits")
    parser.add_argument("--quick", action="store_true", help="small problems and few rounds")
    parser.add_argument("--rounds", type=size, default=15, help="at most (default: 15)")
    parser.add_argument(
        "--seconds", type=positive, default=60, help="for one problem, roughly (default: 60)"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write all that was measured there"
    )
    parser.add_argument(
        "--plot", type=output_file, metavar="FILE", help="draw a sweep over one of the sizes there"
    )
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        from tqdm import tqdm

        from sxe._tools.bench import report

        if arguments.plot:
            from matplotlib.figure import Figure
    except ImportError as error:
        parser.error(f"needs {error.name}: pip install 'sxe[bench]'")
    _check_problem(parser, arguments)
    # Torch has a process of its own on the same card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    peers = _peers(parser, arguments)
    if arguments.suite:
        return _run_suite(arguments, peers)
    problems = _problems(arguments)
    if arguments.plot:
        several = report.varied(problems)
        if len(several) != 1:
            parser.error(
                "--plot: expected one of --rows, --hidden and --classes with several sizes, the "
                f"others with one, got several for {' and '.join(several) or 'none'}"
            )
        if arguments.plot.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
            parser.error(
                f"--plot: expected a file name in .png, .pdf or .svg, got {arguments.plot}"
            )
    kinds = {"value": (False,), "both": (True,), None: (False, True)}[arguments.only]
    rounds = min(5, arguments.rounds) if arguments.quick else arguments.rounds

    machine = measure.machine()
    print(report.heading(machine), flush=True)
    calls = list(measure.calls(rounds, arguments.confident)) if arguments.calls else []
    measurements: list[measure.Measurement] = []
    # No bar where standard error is no terminal.
    with tqdm(total=len(problems) * len(kinds) * rounds, disable=None, leave=False) as bar:
        for problem in problems:
            bar.set_description(problem.name)
            for gradient in kinds:
                measurements.append(
                    measure.measure(
                        problem,
                        peers,
                        gradient=gradient,
                        rounds=rounds,
                        seconds=arguments.seconds,
                        chunk_sizes=arguments.chunk_size or (),
                        on_round=bar.update,
                    )
                )
                bar.update(len(measurements) * rounds - bar.n)
    if measurements:
        print(report.table(measurements), *report.remarks(measurements), sep="\n")
    if calls:
        print(report.calls_table(calls))
    if arguments.json:
        arguments.json.write_text(report.to_json(machine, measurements, calls))
    if arguments.plot:
        report.plot(measurements, str(arguments.plot))
    return _exit_code(measurements)


def _exit_code(measurements: Sequence[measure.Measurement]) -> int:
    return 1 if any(t.wrong and t.name == "sxe" for m in measurements for t in m.timings) else 0


def _run_suite(arguments: argparse.Namespace, peers: Sequence[str]) -> int:
    """A problem that fails, or that the budget has no time for, takes nothing from the others."""
    from sxe._tools.bench import report

    start = time.perf_counter()

    def phase(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    machine = measure.machine()
    print(report.heading(machine), flush=True)
    phase("machine measured")
    problems, chunk_sizes = _suite(arguments)
    measurements: list[measure.Measurement] = []
    failed = False
    expected = 0.0  # seconds that the next problem takes
    for problem in problems:
        begun = time.perf_counter()
        if arguments.budget and expected and begun - start + expected > arguments.budget:
            phase(f"no time left for {problem.name}")
            break
        phase(problem.name)
        try:
            measurements.append(
                measure.measure(
                    problem,
                    peers,
                    gradient=True,
                    rounds=min(SUITE_ROUNDS, arguments.rounds),
                    seconds=arguments.seconds,
                    chunk_sizes=chunk_sizes.get(problem, ()),
                    on_phase=phase,
                )
            )
        except Exception as error:
            failed = True
            phase(f"failed at {problem.name}: {type(error).__name__}: {error}")
        else:
            print(f"\n{report.problem_table(measurements[-1])}", flush=True)
            if arguments.json:
                _replace(arguments.json, report.to_json(machine, measurements, []))
        expected = time.perf_counter() - begun
        if chunk_sizes.get(problem) and measurements:
            # Most of the time is compiling, and the next problem has fewer contestants.
            count = len(measurements[-1].timings)
            expected *= 1 - len(chunk_sizes[problem]) / count
    if measurements:
        print("", report.table(measurements), *report.remarks(measurements), sep="\n")
    return 1 if failed else _exit_code(measurements)


def _suite(arguments: argparse.Namespace) -> tuple[list[Problem], dict[Problem, Sequence[int]]]:
    """The problems of this device, and the sizes of chunks that the first head is run with."""
    on_cpu = jax.default_backend() == "cpu"
    problems = (
        standard_problems(arguments.quick, arguments.confident)
        if on_cpu
        else gpu_problems(arguments.confident)
    )
    heads = [p for p in problems if p.hidden is not None]
    sizes = arguments.chunk_size or (() if on_cpu else SUITE_CHUNKS)
    return problems, dict.fromkeys(heads[:1], sizes)


def _replace(file: Path, text: str) -> None:
    """Whoever is cut off meanwhile leaves what was there before."""
    unfinished = file.with_name(f"{file.name}.part")
    unfinished.write_text(text)
    unfinished.replace(file)


def _check_problem(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    sizes = (arguments.rows, arguments.classes, arguments.hidden)
    if any(sizes) and not arguments.rows:
        parser.error("--rows: expected with --classes or --hidden")
    if any(sizes) and not arguments.classes:
        parser.error("--classes: expected with --rows or --hidden")
    for option in ("dtype", "dense"):
        if getattr(arguments, option) and not any(sizes):
            parser.error(f"--{option}: expected with --rows and --classes")
    if arguments.dense and arguments.hidden:
        parser.error("--dense: expected logits, without --hidden")
    if not 0 < arguments.counting <= 1:
        parser.error(f"--counting: expected a share in (0, 1], got {arguments.counting}")
    if arguments.counting < 1 and not arguments.hidden:
        parser.error("--counting: expected with --hidden")
    if arguments.suite:
        for option in ("rows", "classes", "hidden", "dtype", "dense", "only", "calls", "plot"):
            if getattr(arguments, option):
                parser.error(f"--{option}: expected without --suite, which has its own problems")
    elif arguments.budget:
        parser.error("--budget: expected with --suite")
    if arguments.chunk_size and not (arguments.hidden or arguments.suite):
        parser.error("--chunk-size: expected with --hidden or --suite")
    if not 0 <= arguments.confident <= 1:
        parser.error(f"--confident: expected a share in [0, 1], got {arguments.confident}")


def _peers(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[str, ...]:
    found = contestants.installed()
    peers = tuple(found if arguments.peers is None else arguments.peers)
    if missing := [name for name in peers if name not in found]:
        parser.error(f"--peers: not installed: {', '.join(missing)}; found {', '.join(found)}")
    return peers


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    """Those of the sizes that are given, or else the standard ones; for --calls none of these."""
    if arguments.rows:
        return [
            Problem(
                rows,
                classes,
                hidden,
                dtype,
                dense=arguments.dense,
                confident=arguments.confident,
                counting=arguments.counting,
            )
            for hidden in arguments.hidden or (None,)
            for classes in arguments.classes
            for rows in arguments.rows
            for dtype in arguments.dtype or ("float32",)
        ]
    return [] if arguments.calls else standard_problems(arguments.quick, arguments.confident)
