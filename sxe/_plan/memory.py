"""What XLA allocates in addition to arguments and results, at the moment of a call's peak memory.

There is one estimate for each platform. It names the arrays that exist at that moment and gives
their bytes. C is the number of rows in a chunk. N, D and K are sizes on the device, and each side
has its own D.

The memory of a result is free until the result is computed. XLA puts an array there that is needed
earlier. Such an array is no temporary and is not named.
"""

import math
from collections.abc import Iterable

from sxe._head.loops import classes_per_block
from sxe._head.path import AGAIN, FORWARD
from sxe._plan.work import Side, Work
from sxe._rows.blocks import rows_per_block

Terms = dict[str, int]

# For a divergence on a CPU: how many blocks of rows XLA writes out in addition to the logits, by
# the number of sides that have a gradient.
BLOCKS = {None: (1,), FORWARD: (1, 4, 7), AGAIN: (1, 3, 5), "jensen_shannon": (3, 7, 14)}


def temporaries(work: Work) -> Terms:
    """The bytes of each array, by name."""
    estimate = {"cpu": _on_cpu, "gpu": _on_gpu, "tpu": _on_tpu}[work.backend.platform]
    return {name: size for name, size in estimate(work).items() if size}


def _wide(work: Work, *shape: int) -> int:
    """The bytes of an array in float32 or float64."""
    return math.prod(shape) * work.wide_itemsize


def _largest(moments: Iterable[Terms]) -> Terms:
    return max(moments, key=lambda terms: sum(terms.values()))


# CPU. XLA writes out what it can't fuse, for one block of rows or classes at a time.


def _on_cpu(work: Work) -> Terms:
    in_loop = _in_loop(work) | _of_version(work)
    moments = _of_divergence(work) if work.has_targets else [_of_rows(work)]
    moments += [_of_products(work, side) for side in work.sides]
    moments = [_beside_results(work, in_loop | m, hold_gradients=True) for m in moments]
    return _largest([*moments, *_after_loop(work)])


def _of_version(work: Work) -> Terms:
    """What some versions of XLA's CPU backend hold in memory during the loop over chunks."""
    terms = {}
    if work.backend.widens_arrays_in_loops and work.is_narrow:
        for side in work.sides:
            widened = _wide(work, work.elements[side.hidden]) * (work.tiling.chunks > 1)
            terms[f"{side.hidden}, widened"] = widened
            as_integers = _kernel(work, side) * (side.hidden in work.differentiate)
            terms[f"{side.kernel}, as integers"] = as_integers
    return terms


def _of_rows(work: Work) -> Terms:
    """The arrays that exist while the row function of a loss computes a block of rows."""
    chunk = work.tiling.size
    rows = rows_per_block((chunk, work.classes), work.backend)
    block = _wide(work, rows, work.classes)
    dense, capped = "label_smoothing" in work.options, "softcap" in work.options
    fused = {"label_smoothing", "label_weights"}
    masked = {"where"} if work.tiling.padding else set()
    transformed = (work.options | masked) - fused - ({"where"} if work.skips else set())
    terms = {
        "row block: logits": block * (rows < chunk),
        # All logits of the block except the largest ones. Their exponentials sum to r.
        "row block: smaller logits": block,
    }
    if work.backend.writes_out_transformed_logits and transformed:
        terms["row block: transformed"] = block
    if dense and work.path == FORWARD:
        terms["row block: dense targets"] = block
    if dense and capped:
        # XLA fuses either of the two, but not both together.
        terms["row block: softcap"] = block * (2 if work.path == FORWARD else 1)
    elif capped and "class_mask" in work.options:
        terms["row block: softcap"] = block
    return terms | _hidden_for_kernels(work)


def _of_divergence(work: Work) -> list[Terms]:
    """The arrays that exist while a divergence compares a block of rows of both sides."""
    chunk, gradients = work.tiling.size, len(work.wanted_sides)
    rows = rows_per_block((chunk, 2 * work.classes), work.backend)
    block = _wide(work, rows, work.classes)
    mode = "jensen_shannon" if work.mixes else None
    terms = {"row blocks: probabilities": BLOCKS[mode or work.path][gradients] * block}
    if work.path is not None and "softcap" in work.options:
        terms["row blocks: softcap"] = (1 + 2 * gradients) * block
    terms |= _hidden_for_kernels(work)
    if rows == chunk:
        return [terms]
    # Some versions copy the logits that gradients replace. Measurements show that they do so if
    # both sides have gradients, and for one side in a forward pass on one device. They do not if
    # the last step that makes the logits is a softcap or a logit_scale.
    alone = work.row_groups == work.class_shards == 1
    replaced = gradients == 2 or (gradients == 1 and work.path == FORWARD and alone)
    order = ("class_mask", "softcap", "bias", "logit_scale")  # from the last to the first step
    last = next((option for option in order if option in work.options), None)
    multiplied = last in ("softcap", "logit_scale")
    if work.backend.copies_tiles_it_replaces and replaced and not multiplied:
        copied = {f"{side.logits} of a chunk, copied": _logits(work) for side in work.wanted_sides}
        return [terms | copied] if work.path == FORWARD else [terms, copied]
    return [terms | {f"row block: {side.logits}": block for side in work.sides}]


def _hidden_for_kernels(work: Work) -> Terms:
    """The hidden states of a chunk, which the gradient of their kernel needs."""
    sides = [side for side in work.sides if side.kernel in work.differentiate]
    return {_chunk_of(side.hidden): _hidden_chunk(work, side) for side in sides}


def _of_products(work: Work, side: Side) -> Terms:
    """The arrays that exist in the matrix products of a chunk. Gradients go by class blocks."""
    terms: Terms = {}
    for each in work.sides:
        size = _hidden_chunk(work, each)
        terms[_chunk_of(each.hidden)] = size
        terms[f"gradient of {each.hidden}, a chunk"] = size * (each.hidden in work.differentiate)
    classes = classes_per_block(side.size, work.classes, work.backend)
    widens = work.wanted(side) and work.gradient_dtype != work.dtype
    if classes < work.classes and (side.kernel in work.differentiate or widens):
        terms["class block: gradient"] = _wide(work, work.tiling.size, classes)
        # Either the kernel, widened, or its gradient.
        terms["class block: kernel"] = _wide(work, side.size, classes)
    return terms


def _chunk_of(name: str) -> str:
    return f"{name} of a chunk"


def _hidden_chunk(work: Work, side: Side) -> int:
    """The bytes of hidden states [C, D], unless they are an argument or a result themselves."""
    apart = work.tiling.chunks > 1 or work.is_narrow
    return _wide(work, work.tiling.size, side.size) * apart


# GPU. XLA fuses the row functions with all options, but not with the matrix products.


def _on_gpu(work: Work) -> Terms:
    chunks, rows, _ = work.tiling
    gradient = rows * work.classes * work.gradient_dtype.itemsize
    # XLA puts a gradient of the same dtype in the memory of the logits. A GPU kernel doesn't.
    in_place = work.gradient_dtype.itemsize == work.wide_itemsize
    in_place = in_place and not work.makes_gradient_with_state
    terms = _in_loop(work) | _before_softcap(work)
    for side in work.sides:
        wanted = bool(work.wanted(side))
        terms[_chunk_of(side.hidden)] = _wide(work, rows, side.size) * (chunks > 1)
        terms[f"gradient of {side.logits}"] = gradient * (wanted and not in_place)
        if "class_mask" in work.options and side.hidden in work.differentiate:
            terms[f"{side.kernel}, masked"] = _kernel(work, side)
        if work.is_narrow and work.classes % work.backend.class_multiple:
            terms[f"{side.kernel}, padded"] = _kernel(work, side)
            terms[f"gradient of {side.logits}, padded"] = gradient * wanted  # in bfloat16
    return _largest([_beside_results(work, terms, hold_gradients=False), *_after_loop(work)])


# TPU. XLA fuses the row functions with the matrix products, except for a tanh.


def _on_tpu(work: Work) -> Terms:
    terms = _in_loop(work) | _before_softcap(work)
    return _largest([terms, *(_after_loop(work) if work.path == FORWARD else ())])


# Shared by all platforms.


def _logits(work: Work) -> int:
    return _wide(work, work.tiling.size, work.classes)


def _before_softcap(work: Work) -> Terms:
    """The logits before the softcap, which its derivative needs."""
    sides = work.wanted_sides if "softcap" in work.options else ()
    return {f"{side.logits} before the softcap": _logits(work) for side in sides}


def _kernel(work: Work, side: Side) -> int:
    """The bytes of a kernel with the rows of all devices."""
    return work.elements[side.kernel] * work.dtype.itemsize


def _in_loop(work: Work) -> Terms:
    """The arrays that exist during the loop over chunks."""
    chunks, _, padding = work.tiling
    terms: Terms = {}
    for side in work.sides:
        terms[_chunk_of(side.logits)] = _logits(work)
        terms[f"{side.kernel}, gathered"] = _kernel(work, side) * (work.kernel_parts > 1)
        terms |= _gradient(work, side.kernel)
        if chunks > 1:
            padded = _wide(work, work.elements[side.hidden]) * (padding > 0)
            terms[f"{side.hidden}, padded"] = padded
            terms |= _gradient(work, side.hidden)
    return terms


def _gradient(work: Work, name: str) -> Terms:
    """The gradient, if it is computed in an array of its own before the result is made from it."""
    apart = _has_gradient_apart(work, name)
    return {_gradient_name(work, name): _wide(work, work.elements[name])} if apart else {}


def _gradient_name(work: Work, name: str) -> str:
    return f"gradient of {name}, float{8 * work.wide_itemsize}"


def _has_gradient_apart(work: Work, name: str) -> bool:
    summed = name in work.summed
    if name not in work.differentiate:
        return False
    if work.is_narrow:
        return True
    if work.backend.copies_scaled_gradients:
        return summed or work.path == FORWARD
    if name in {side.hidden for side in work.sides}:
        # The rows of this array are in the order of the chunks, so it is not the result itself. If
        # devices sum the gradient, XLA makes a second array for the sum. This array can then use
        # the memory of the result, and is not counted.
        return work.tiling.chunks > 1 and not summed
    # Likewise for a kernel: if devices sum a scaled gradient, the scaled array lies between.
    return work.kernel_parts > 1 or (summed and work.path == AGAIN)


def _beside_results(work: Work, terms: Terms, *, hold_gradients: bool) -> Terms:
    """Leave out arrays in the memory of results: for each result, the largest one that fits.

    Args:
      work: the call.
      terms: the arrays that exist at one moment.
      hold_gradients: whether a result may hold the gradient from which the other result of its side
        is made.
    """
    left = dict(terms)
    gradients = {_gradient_name(work, name) for name in work.elements}
    for side in work.sides:
        for name, other in ((side.kernel, side.hidden), (side.hidden, side.kernel)):
            apart = gradients - ({_gradient_name(work, other)} if hold_gradients else set())
            fits = [t for t in left if t not in apart and left[t] <= work.input_bytes[name]]
            if _has_gradient_apart(work, name) and fits:
                del left[max(fits, key=left.__getitem__)]
    return left


def _after_loop(work: Work) -> list[Terms]:
    """The arrays that exist while devices sum gradients: scaled before, or rounded afterwards."""
    if not work.summed or not (work.path == FORWARD or work.is_narrow):
        return []
    what = "scaled" if work.path == FORWARD else "summed"
    terms: Terms = {}
    for side in work.sides:
        terms |= _gradient(work, side.kernel) | _gradient(work, side.hidden)
    more = {f"gradient of {name}, {what}": _wide(work, work.elements[name]) for name in work.summed}
    if work.kernel_parts == 1:
        return [terms | more]
    # The kernel's gradient is scattered, either before or after the gradient of hidden is summed.
    return [terms | {name: size} for name, size in more.items()]
