"""What XLA allocates beside arguments and results, at the moment when a call needs most.

Each platform has its estimate. It names the arrays that exist at that moment and gives their bytes.
C are the rows of a chunk. N, D and K are those of the device.

A result is no temporary, and its memory is free until it is computed. XLA puts an array there that
is needed before, and such an array is not named.
"""

import math
from collections.abc import Iterable

from sxe._head.loops import classes_per_block
from sxe._head.path import AGAIN, FORWARD
from sxe._plan.work import INPUTS, Work
from sxe._rows.blocks import rows_per_block

Terms = dict[str, int]

HIDDEN_CHUNK = "hidden of a chunk"


def temporaries(work: Work) -> Terms:
    """The bytes of each array, by its name."""
    estimate = {"cpu": _on_cpu, "gpu": _on_gpu, "tpu": _on_tpu}[work.backend.platform]
    return {name: size for name, size in estimate(work).items() if size}


def _wide(work: Work, *shape: int) -> int:
    """The bytes of an array in float32 or float64."""
    return math.prod(shape) * work.wide_itemsize


def _largest(moments: Iterable[Terms]) -> Terms:
    return max(moments, key=lambda terms: sum(terms.values()))


# A CPU. XLA writes out what it can't fuse, for a block of rows or of classes at a time.


def _on_cpu(work: Work) -> Terms:
    in_loop = _in_loop(work) | _of_version(work)
    moments = [_of_rows(work), _of_products(work)]
    moments = [_beside_results(work, in_loop | m, hold_gradients=True) for m in moments]
    return _largest([*moments, *_after_loop(work)])


def _of_version(work: Work) -> Terms:
    """What some versions of XLA's CPU backend need as long as the loop over chunks runs."""
    terms = {}
    if work.backend.widens_arrays_in_loops and work.is_narrow:
        terms["hidden, widened"] = _wide(work, work.rows, work.hidden) * (work.tiling.chunks > 1)
        terms["kernel, as integers"] = work.kernel_bytes * ("hidden" in work.differentiate)
    return terms


def _of_rows(work: Work) -> Terms:
    """While a block of rows goes through the functions of rows."""
    chunk = work.tiling.size
    rows = rows_per_block((chunk, work.classes), work.backend)
    block = _wide(work, rows, work.classes)
    dense, capped = "label_smoothing" in work.options, "softcap" in work.options
    fused = {"label_smoothing", "label_weights"}
    masked = {"where"} if work.tiling.padding else set()
    transformed = (work.options | masked) - fused - ({"where"} if work.skips else set())
    terms = {
        "row block: logits": block * (rows < chunk),
        # All but the largest ones, whose sum is r.
        "row block: smaller logits": block,
    }
    if work.backend.writes_out_transformed_logits and transformed:
        terms["row block: transformed"] = block
    if dense and work.path == FORWARD:
        terms["row block: dense targets"] = block
    if dense and capped:
        # XLA fuses each of the two, but not all of both.
        terms["row block: softcap"] = block * (2 if work.path == FORWARD else 1)
    elif capped and "class_mask" in work.options:
        terms["row block: softcap"] = block
    if "kernel" in work.differentiate:
        terms[HIDDEN_CHUNK] = _hidden_chunk(work)
    return terms


def _of_products(work: Work) -> Terms:
    """While a chunk is multiplied, for its gradients a block of classes at a time."""
    terms = {HIDDEN_CHUNK: _hidden_chunk(work)}
    if "hidden" in work.differentiate:
        terms["gradient of hidden, a chunk"] = _hidden_chunk(work)
    classes = classes_per_block(work.hidden, work.classes, work.backend)
    widens = work.differentiate and work.gradient_dtype != work.dtype
    if classes < work.classes and ("kernel" in work.differentiate or widens):
        terms["class block: gradient"] = _wide(work, work.tiling.size, classes)
        # Of the kernel, widened, or of its gradient.
        terms["class block: kernel"] = _wide(work, work.hidden, classes)
    return terms


def _hidden_chunk(work: Work) -> int:
    """The bytes of [C, D], if it is not an argument or a result itself."""
    apart = work.tiling.chunks > 1 or work.is_narrow
    return _wide(work, work.tiling.size, work.hidden) * apart


# A GPU. XLA fuses the functions of rows, options and all, but not with the products.


def _on_gpu(work: Work) -> Terms:
    chunks, rows, _ = work.tiling
    gradient = rows * work.classes * work.gradient_dtype.itemsize * (work.path is not None)
    terms = _in_loop(work)
    terms[HIDDEN_CHUNK] = _wide(work, rows, work.hidden) * (chunks > 1)
    # XLA puts one of the same dtype in the place of the logits. A kernel doesn't.
    in_place = work.gradient_dtype.itemsize == work.wide_itemsize
    in_place = in_place and not work.makes_gradient_with_state
    terms["gradient of logits"] = gradient * (not in_place)
    if work.path is not None and "softcap" in work.options:
        terms["logits before the softcap"] = _logits(work)
    if "class_mask" in work.options and "hidden" in work.differentiate:
        terms["kernel, masked"] = work.kernel_bytes
    if work.is_narrow and work.classes % work.backend.class_multiple:
        terms["kernel, padded"] = work.kernel_bytes
        terms["gradient of logits, padded"] = gradient  # in bfloat16
    return _largest([_beside_results(work, terms, hold_gradients=False), *_after_loop(work)])


# A TPU. XLA fuses the functions of rows with the products, except a tanh.


def _on_tpu(work: Work) -> Terms:
    terms = _in_loop(work)
    if work.path is not None and "softcap" in work.options:
        terms["logits before the softcap"] = _logits(work)
    return _largest([terms, *(_after_loop(work) if work.path == FORWARD else ())])


# What all of them share.


def _logits(work: Work) -> int:
    return _wide(work, work.tiling.size, work.classes)


def _in_loop(work: Work) -> Terms:
    """As long as the loop over chunks runs."""
    chunks, _, padding = work.tiling
    terms = {"logits of a chunk": _logits(work)}
    terms["kernel, gathered"] = work.kernel_bytes * (work.kernel_parts > 1)
    terms |= _gradient(work, "kernel")
    if chunks > 1:
        terms["hidden, padded"] = _wide(work, work.rows, work.hidden) * (padding > 0)
        terms |= _gradient(work, "hidden")
    return terms


def _gradient(work: Work, name: str) -> Terms:
    """That gradient, if it is computed in an array of its own, from which the result is made."""
    apart = _has_gradient_apart(work, name)
    return {_gradient_name(work, name): _gradient_bytes(work, name)} if apart else {}


def _gradient_name(work: Work, name: str) -> str:
    return f"gradient of {name}, float{8 * work.wide_itemsize}"


def _gradient_bytes(work: Work, name: str) -> int:
    return _wide(work, work.hidden, work.rows if name == "hidden" else work.classes)


def _has_gradient_apart(work: Work, name: str) -> bool:
    summed = name in work.summed
    if name not in work.differentiate:
        return False
    if work.is_narrow:
        return True
    if work.backend.copies_scaled_gradients:
        return summed or work.path == FORWARD
    if name == "hidden":
        # The result has the order of rows, this one that of chunks. Where devices sum it, the array
        # that they sum lies between the two, so that this one may lie in the result.
        return work.tiling.chunks > 1 and not summed
    # Likewise, where devices sum a scaled one.
    return work.kernel_parts > 1 or (summed and work.path == AGAIN)


def _beside_results(work: Work, terms: Terms, *, hold_gradients: bool) -> Terms:
    """Without those that lie in the memory of results: the largest one that fits into each.

    Args:
      work: the call.
      terms: what exists at one moment.
      hold_gradients: whether a result may hold the gradient from which the other one is made.
    """
    left = dict(terms)
    gradients = {name: _gradient_name(work, name) for name in INPUTS}
    for name in ("kernel", "hidden"):
        apart = {gradients[name]} if hold_gradients else set(gradients.values())
        fits = [t for t in left if t not in apart and left[t] <= work.input_bytes[name]]
        if _has_gradient_apart(work, name) and fits:
            del left[max(fits, key=left.__getitem__)]
    return left


def _after_loop(work: Work) -> list[Terms]:
    """While devices sum gradients: what they sum is scaled, or what they get is then rounded."""
    if not work.summed or not (work.path == FORWARD or work.is_narrow):
        return []
    what = "scaled" if work.path == FORWARD else "summed"
    terms = _gradient(work, "kernel") | _gradient(work, "hidden")
    more = {f"gradient of {name}, {what}": _gradient_bytes(work, name) for name in work.summed}
    if work.kernel_parts == 1:
        return [terms | more]
    # The kernel's is scattered, before that of hidden is summed or after it.
    return [terms | {name: size} for name, size in more.items()]
