"""Measurements as tables, as JSON, and as a plot."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from tabulate import tabulate

from sxe._tools.bench.measure import Calls, Machine, Measurement, Timing
from sxe._tools.bench.problem import Problem


def heading(machine: Machine) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    rates = ", ".join(f"{dtype} {_flops(rate)}" for dtype, rate in machine.matmul.items())
    device = machine.card or machine.device
    return (
        f"{device}, {machine.cores} CPU cores, {machine.devices} device(s); {versions}\n"
        f"copy {machine.copy / 1e9:,.1f} GB/s; matmul {rates}; "
        f"float32 products: {machine.float32_products}"
    )


def _flops(rate: float) -> str:
    unit, name = (1e12, "TFLOP/s") if rate >= 1e12 else (1e9, "GFLOP/s")
    return f"{rate / unit:,.3g} {name}" if rate < 100 * unit else f"{rate / unit:,.0f} {name}"


def _rate(m: Measurement, t: Timing) -> str:
    """The rate at which a call did its minimal work: bytes for logits, FLOPs for the head."""
    flops, least = m.problem.flops(m.gradient), m.problem.least_bytes(m.gradient)
    if flops is not None:
        return _flops(flops / t.median)
    assert least is not None
    return f"{least / t.median / 1e9:,.1f} GB/s"


def table(measurements: Sequence[Measurement]) -> str:
    """One row per problem: the time of sxe, and its ratio to the floor and to each peer.

    The column MiB has the temporary memory of each contestant for which it is known.
    """
    names = dict.fromkeys(t.name for m in measurements for t in m.timings if t.name != "sxe")
    peers = [name for name in names if name != "floor"]
    timings = [{t.name: t for t in m.timings} for m in measurements]
    known = ["sxe"]
    known += [p for p in peers if any(p in t and t[p].temporary_bytes is not None for t in timings)]
    rows = []
    for m, by_name in zip(measurements, timings, strict=True):
        ours, floor = by_name["sxe"], by_name["floor"]
        ratios = [_ratio(ours, by_name.get(name)) for name in peers]
        mib = "/".join(_mib(by_name[name]) if name in by_name else "-" for name in known)
        what = "both" if m.gradient else "value"
        ms = 1e3 * ours.median
        sxe_columns = [f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}", _rate(m, ours)]
        sxe_columns += [f"{ours.over(floor)[0]:.2f}"]
        rows.append([m.problem.name, what, *sxe_columns, *ratios, mib, _compile(by_name)])
    columns = ["N x K or N x D x K", "", "sxe, ms", "rate", "/ floor"]
    columns += [*(f"/ {name}" for name in peers), f"MiB: {'/'.join(known)}", "compile"]
    return tabulate(rows, columns, disable_numparse=True)


def problem_table(m: Measurement) -> str:
    """The table of one problem, with one row per contestant."""
    floor = next(t for t in m.timings if t.name == "floor")
    rows = []
    for t in m.timings:
        if t.failed:
            rows.append([t.name, *[""] * 6, t.failed[:100]])
            continue
        low, high = (1e3 * float(x) for x in np.percentile(t.seconds, [25, 75]))
        times = f"{1e3 * t.median:.4g} ({low:.4g}..{high:.4g})"
        rate = "" if t is floor else _rate(m, t)
        share = f"{floor.median / t.median:.0%}"
        compiling = "" if t.compile_seconds is None else f"{t.compile_seconds:.1f}"
        error = "" if t.loss_error is None else f"{t.loss_error:.0e}"
        error += "" if t.gradient_error is None else f", {t.gradient_error:.0e}"
        rows.append([t.name, times, rate, share, _mib(t), compiling, error, "wrong" * t.wrong])
    columns = [m.name, "ms", "rate", "floor's share", "MiB", "compile, s", "error", ""]
    return tabulate(rows, columns, disable_numparse=True)


def _ratio(ours: Timing, theirs: Timing | None) -> str:
    if theirs is None:
        return ""
    if theirs.failed:
        return "failed"
    middle, low, high = ours.over(theirs)
    return f"{middle:.2f} ({low:.2f}..{high:.2f}){' !' * theirs.wrong}"


def _mib(t: Timing) -> str:
    return "?" if t.temporary_bytes is None else f"{t.temporary_bytes / 2**20:,.0f}"


def _compile(by_name: dict[str, Timing]) -> str:
    ours, theirs = by_name["sxe"], by_name.get("optax")
    if theirs is None or theirs.compile_seconds is None or ours.compile_seconds is None:
        return ""
    return f"{ours.compile_seconds / theirs.compile_seconds:.2f}"


def remarks(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Lines about wrong results, about peers that failed, and about how sxe computed."""
    for m in measurements:
        for t in m.timings:
            if t.wrong:
                gradient = "" if t.gradient_error is None else f", gradient {t.gradient_error:.1e}"
                yield f"! {t.name} is wrong at {m.name}: error of loss {t.loss_error:.1e}{gradient}"
            if t.failed:
                yield f"{t.name} failed at {m.name}: {t.failed}"
    for path, found in groupby(sorted(measurements, key=lambda m: m.path), lambda m: m.path):
        names = dict.fromkeys(m.problem.sizes for m in found)
        yield f"sxe, {path}: {'; '.join(names)}"


def calls_table(calls: Sequence[Calls]) -> str:
    rows = []
    for c in calls:
        ours, theirs = (Timing(name, c.seconds[name]) for name in ("sxe", "optax"))
        rows.append(
            ["eager" if c.eager else "jitted", "both" if c.gradient else "value"]
            + [f"{1e6 * t.median:,.0f}" for t in (ours, theirs)]
            + [_ratio(ours, theirs)]
        )
    columns = ["8 x 10", "", "sxe, us", "optax, us", "sxe / optax"]
    return tabulate(rows, columns, disable_numparse=True)


def to_json(machine: Machine, measurements: Sequence[Measurement], calls: Sequence[Calls]) -> str:
    def plain(m: Measurement) -> dict[str, Any]:
        timings = [t._asdict() for t in m.timings]
        return {**m._asdict(), "problem": m.problem._asdict(), "timings": timings}

    report = {
        "machine": machine._asdict(),
        "measurements": [plain(m) for m in measurements],
        "calls": [c._asdict() for c in calls],
    }
    return json.dumps(report, indent=1)


def varied(problems: Sequence[Problem]) -> list[str]:
    """The names of the sizes that differ among the problems. A plot needs exactly one."""
    sizes = ("rows", "hidden", "classes")
    return [name for name in sizes if len({getattr(p, name) for p in problems}) > 1]


def plot(measurements: Sequence[Measurement], file: str) -> None:
    """Plot time and temporary memory over the size that varies, one line per contestant."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullLocator, StrMethodFormatter

    (name,) = varied([m.problem for m in measurements])
    figure = Figure(figsize=(10, 4), layout="constrained")
    of_time, of_memory = figure.subplots(1, 2)
    lines: dict[str, list[tuple[int, Timing]]] = {}
    for m in measurements:
        for t in m.timings:
            if t.seconds:
                key = f"{t.name}, {m.problem.dtype}, {'both' if m.gradient else 'value'}"
                lines.setdefault(key, []).append((getattr(m.problem, name), t))
    for key, points in lines.items():
        style = {"marker": "o", "label": key, "linestyle": ":" if "floor" in key else "-"}
        of_time.loglog([n for n, _ in points], [1e3 * t.median for _, t in points], **style)
        known = [(n, t.temporary_bytes / 2**20) for n, t in points if t.temporary_bytes]
        if known and "floor" not in key:
            of_memory.loglog(*zip(*known, strict=True), **style)
    for axes, label in ((of_time, "milliseconds"), (of_memory, "temporary memory, MiB")):
        axes.set_xlabel(name)
        axes.set_ylabel(label)
        axes.set_xticks(sorted({getattr(m.problem, name) for m in measurements}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,}"))
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.grid(alpha=0.3)
    of_time.legend(fontsize="small")
    figure.savefig(file, dpi=150)
