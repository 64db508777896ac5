"""What a compiled program moves between devices, read from XLA's text of it."""

import math
import re
from typing import NamedTuple

_OPCODE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(-start)?\(([^)]*)\)"
)
_TYPE = re.compile(r"\b(pred|[a-z]+([0-9]+)[a-z0-9]*)\[([0-9,]*)\]")


class Collective(NamedTuple):
    """One, on each device.

    ``size`` is the elements of its largest operand or result; ``bytes`` those of all operands or
    all results, whichever are more; ``times`` how often loops run it, None outside of any.
    """

    opcode: str
    size: int
    bytes: int
    times: int | None

    @property
    def in_loop(self):
        return self.times is not None


def _arrays(text):
    """Elements and bytes of every type in the text."""
    found = []
    for _, bits, dims in _TYPE.findall(text):
        n = math.prod(int(n) for n in dims.split(",") if n)
        found.append((n, n * (int(bits) // 8 if bits else 1)))
    return found


def _computations(hlo):
    """The lines of each computation, by its name."""
    found = {"": (lines := [])}
    for line in hlo.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            found[match[1]] = lines = []
        lines.append(line)
    return found


def _times(computations):
    """How often loops run each computation; those outside of any loop are left out."""
    calls = {name: [] for name in computations}  # what each calls, and how often
    for name, lines in computations.items():
        for line in lines:
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for key, names in re.findall(r"(\w+)=\{?((?:%[\w.-]+(?:, )?)+)", line):
                # A TPU's XLA does not say how often.
                times = (int(count[1]) if count else 1) if key == "body" else None
                calls[name] += [(n, times) for n in re.findall(r"%([\w.-]+)", names)]
    found = {}
    todo = [(body, n) for each in calls.values() for body, n in each if n is not None]
    while todo:
        name, times = todo.pop()
        found[name] = max(times, found.get(name, 0))
        for callee, n in calls.get(name, []):
            todo.append((callee, times * (n or 1)))
    return found


def _devices(line):
    """How many take part with each other."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(part.split("=") for part in match[1].split(","))
        return math.prod(int(sizes[name]) for name in match[2].split(","))
    return None


def collectives(hlo):
    """Every collective between devices of a compiled program, ``compiled.as_text()``."""
    computations = _computations(hlo)
    times = _times(computations)
    out = []
    for name, lines in computations.items():
        defined = {}
        for line in lines:
            if match := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)", line):
                # The type, a tuple's too, ends where the opcode begins.
                defined[match[1]] = _arrays(re.split(r" [\w-]+\(", match[2], maxsplit=1)[0])
        for line in lines:
            # One along a mesh axis of size 1 moves nothing.
            if (match := _OPCODE.search(line)) and _devices(line) != 1:
                operands = _arrays(match[3]) or [
                    array
                    for operand in re.findall(r"[\w.-]+", match[3])
                    for array in defined.get(operand, [])
                ]
                results = _arrays(line[: match.start()])
                moved = max(sum(n for _, n in arrays) for arrays in (operands, results))
                size = max(n for n, _ in operands + results)
                out.append(Collective(match[1], size, moved, times.get(name)))
    return out
