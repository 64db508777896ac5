"""What a compiled program moves between devices, or to and from memory, by the text of its HLO."""

import math
import re
from typing import NamedTuple

_OPCODE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(-start)?\(([^)]*)\)"
)
_TYPE = re.compile(r"\b(pred|[a-z]+([0-9]+)[a-z0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\(([^)]*)\)(.*)")
# These refer to arrays that other instructions write, or run another computation.
_MOVES_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier"),
    *("while", "call", "conditional"),
}
_LOOKS_UP = {"gather", "dynamic-slice", "slice"}


class Collective(NamedTuple):
    """A collective operation, on each device.

    ``size`` is the number of elements of its largest operand or result. ``bytes`` is the size of
    all operands or of all results, whichever is larger. ``times`` is how often loops run it, None
    outside loops.
    """

    opcode: str
    size: int
    bytes: int
    times: int | None

    @property
    def in_loop(self):
        return self.times is not None


def _arrays(text):
    """The elements and bytes of every type in the text."""
    found = []
    for _, bits, dims in _TYPE.findall(text):
        n = _elements(dims)
        found.append((n, n * (int(bits) // 8 if bits else 1)))
    return found


def _elements(dims):
    return math.prod(int(n) for n in dims.split(",") if n)


def _computations(hlo):
    """The lines of each computation, by name."""
    found = {"": (lines := [])}
    for line in hlo.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            found[match[1]] = lines = []
        lines.append(line)
    return found


def _times(computations):
    """How often loops run each computation. Computations outside loops are left out."""
    calls = {name: [] for name in computations}  # name: the computations it calls, how often
    for name, lines in computations.items():
        for line in lines:
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for key, names in re.findall(r"(\w+)=\{?((?:%[\w.-]+(?:, )?)+)", line):
                # XLA for TPUs does not print the number of times.
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
    """The number of devices in a group."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(part.split("=") for part in match[1].split(","))
        return math.prod(int(sizes[name]) for name in match[2].split(","))
    return None


def collectives(hlo):
    """All collectives of a compiled program, from ``compiled.as_text()``."""
    computations = _computations(hlo)
    times = _times(computations)
    out = []
    for name, lines in computations.items():
        defined = {}
        for line in lines:
            if match := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)", line):
                # The type, which may be a tuple, ends where the opcode begins.
                defined[match[1]] = _arrays(re.split(r" [\w-]+\(", match[2], maxsplit=1)[0])
        for line in lines:
            # A collective along a mesh axis of size 1 moves nothing.
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


class Pass(NamedTuple):
    """An instruction that reads or writes whole arrays of one size.

    ``kind`` is its opcode, or the target of a custom call. ``reads`` and ``writes`` are the dtypes
    of these arrays, such as "bf16".
    """

    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


class _Instruction(NamedTuple):
    type: str
    opcode: str
    operands: list[str]
    attributes: str

    def dtypes(self, size):
        """The dtypes of the arrays of this size that the instruction writes."""
        return [d for d, _, dims in _TYPE.findall(self.type) if _elements(dims) == size]

    @property
    def fused(self):
        """The name of the computation that a fusion runs, or None."""
        calls = re.search(r"calls=%?([\w.-]+)", self.attributes)
        return calls[1] if calls and self.opcode == "fusion" else None

    @property
    def kind(self):
        target = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return target[1] if target else self.opcode


def _instructions(lines):
    """The instructions of a computation, by name."""
    matches = [match for line in lines if (match := _INSTRUCTION.match(line))]
    names = {match[1] for match in matches}
    found = {}
    for name, of_type, opcode, operands, attributes in (match.groups() for match in matches):
        operands = re.findall(r"[\w.-]+", operands)
        if opcode != "parameter":  # the operand of a parameter is its number
            operands = [each for each in operands if each in names]  # without /*index=5*/
        found[name] = _Instruction(of_type, opcode, operands, attributes)
    return found


def _is_needed_whole(name, instructions, size):
    """Whether a fusion reads all elements of its array ``name``, instead of looking up a few."""
    users = {k: each for k, each in instructions.items() if name in each.operands}
    return not users or any(
        not each.dtypes(size) or _is_needed_whole(k, instructions, size)
        for k, each in users.items()
        if each.opcode not in _LOOKS_UP or each.operands[0] != name
    )


def passes(hlo, size):
    """The instructions of a compiled program that read or write whole arrays of ``size`` elements.

    They are in the order of the text. Each is listed once, also in loops. A fusion counts as one.
    """
    computations = {name: _instructions(lines) for name, lines in _computations(hlo).items()}
    fused = {each.fused for found in computations.values() for each in found.values()}

    def reads(instruction, number):
        if instruction.fused is None:
            return True
        inside = computations[instruction.fused]
        of_number = ("parameter", [str(number)])
        name = next(k for k, each in inside.items() if each[1:3] == of_number)
        return _is_needed_whole(name, inside, size)

    out = []
    for name, instructions in computations.items():
        if name in fused:
            continue
        for each in instructions.values():
            if each.opcode in _MOVES_NOTHING:
                continue
            read = [
                dtype
                for number, operand in enumerate(each.operands)
                for dtype in instructions[operand].dtypes(size)
                if reads(each, number)
            ]
            out.append(Pass(each.kind, tuple(read), tuple(each.dtypes(size))))
    return [each for each in out if each.reads or each.writes]
