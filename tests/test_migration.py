"""The replacements in sxe/docs/migration.md for the losses of other libraries, row by row.

A row of its tables has a call of another library and the equivalent call of sxe. The tests run both
on the same arrays and compare values and gradients. optax runs in the tests, in float64. The other
libraries are too large to be dependencies, so their results are stored below. Where one of them is
installed, a slow test compares it with the stored results. To store new results, use an environment
with one or more of torch==2.13.0, liger-kernel==0.8.5 (with packaging), tokamax==0.0.17 (Python
3.12), trl==1.16.0, verl==0.9.0, google-tunix==0.1.7, and distrax==0.1.9 with rlax==0.1.9. None of
them needs a GPU here. This command prints the results of the installed ones:

    python tests/test_migration.py
"""

import ast
import functools
import importlib.util
import inspect
import os
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from example_runs import run_example
from oracle import assert_close

import sxe

DOCUMENT = Path(sxe.__file__).parent / "docs" / "migration.md"
MODULES = {
    "PyTorch": "torch",
    "optax": "optax",
    "tokamax": "tokamax",
    "Liger": "liger_kernel",
    "TRL": "trl",
    "verl": "verl",
    "tunix": "tunix",
    "distrax": "distrax",
}
DISTRIBUTIONS = {"tunix": "google-tunix"}  # where it differs from the name of the module
FLOAT64 = {"PyTorch", "optax", "TRL", "verl", "distrax"}  # run in float64, the others in float32
WITH_JAX = {"optax", "tokamax", "tunix", "distrax"}
# Relative to the sum of an array's magnitudes.
TOLERANCE = {p: 3e-6 if p in FLOAT64 else 1e-5 for p in MODULES}
NO_COUNTERPART = "—"

N, K, D = 6, 5, 4


def waves(*shape):
    """Values of sines, the same in each library and on each machine."""
    return np.sin(1 + 3.7 * np.arange(np.prod(shape))).reshape(shape)


def probabilities(*shape, axis=-1):
    p = 1.1 + waves(*shape)
    return p / p.sum(axis, keepdims=True)


def names():
    """The document's table of names: arrays with gradients, and the other arrays."""
    labels = np.arange(N) ** 2 % K
    y = np.where(np.arange(N) == 4, -100, labels)
    pixel_y = np.arange(12).reshape(2, 3, 2) % K
    pixel_y[0, 1, 1] = pixel_y[1, 2, 0] = -100
    classes = waves(N, K)[:, ::-1] < 0.9
    classes[np.arange(N), labels] = True
    possible = waves(N, K) < 0.8
    p = probabilities(N, K)
    arrays = {
        "x": 4 * waves(N, K)[:, ::-1],
        "x_inf": np.where(possible, 4 * waves(N, K), -np.inf),
        "p": p,
        "p_inf": np.where(possible, p, 0),
        "pixels": 3 * waves(2, K, 3, 2),
        "pixel_p": probabilities(2, K, 3, 2, axis=1),
        "h": 2 * waves(N, D),
        "w": 1.5 * waves(K, D),
        "b": waves(K),
        "w_multi": waves(K, 2, D),
        "teacher": 3 * waves(N, K)[::-1],
        "teacher_h": 2 * waves(N, 3)[::-1],
        "teacher_w": 1.5 * waves(K, 3)[:, ::-1],
        "hidden": 2 * waves(2, 3, D),
        "old": waves(2, 3) - 1.5,
        "reference": waves(3, 2).T - 1.6,
    }
    # Round to float32, so that the inputs are the same in both precisions.
    arrays = {name: a.astype(np.float32).astype(np.float64) for name, a in arrays.items()}
    others = {
        "y": y,
        "labels": labels,
        "pixel_y": pixel_y,
        "y_multi": np.stack([y, labels], axis=1),
        "rows": np.arange(N) % 3 != 1,
        "classes": classes,
        "c": (1.5 + np.sin(np.arange(K))).astype(np.float32).astype(np.float64),
        "a": 0.2,
        "z": 0.01,
        "s": 2.5,
        "t": 1.5,
        "tokens": labels.reshape(2, 3),
        "mask": np.array([[True, True, True], [False, True, True]]),
        "advantages": np.array([1.0, -0.75]),
    }
    return arrays, others


# The document.


class Row(NamedTuple):
    package: str
    functions: tuple[str, ...]  # of the heading above
    arguments: str
    theirs: str  # an expression
    ours: list[str]  # statements, and at the end an expression
    text: str  # the last cell


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


def tables():
    """Each table of the document: its headings, the cells of its header, and its rows."""
    headings, found = ["", ""], []
    last = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"(##+) (.*)", line):
            level = len(match[1]) - 2
            headings[level:] = [match[2], ""][: 2 - level]
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not last.startswith("|"):
                found.append((*headings, cells, []))
            elif not re.fullmatch(r"[| -]+", line):
                found[-1][3].append(cells)
        last = line
    return found


def read():
    """The rows with calls, and the names in the table of names."""
    rows, legend = [], []
    for package, heading, header, lines in tables():
        if header == ["name", "shape", "meaning"]:
            legend += [name for cells in lines for name in code(cells[0])]
            continue
        assert header[2] == "sxe", header
        for first, theirs, ours in lines:
            row_package = package or first
            assert row_package in MODULES, first
            rows.append(
                Row(row_package, tuple(code(heading)), first, theirs.strip("`"), code(ours), ours)
            )
    return rows, legend


ROWS, LEGEND = read()
CALLS = list({(r.theirs, *r.ours): r for r in ROWS if r.theirs}.values())


def differentiated(row):
    """The names of the arrays that both calls are differentiated for."""
    tree = ast.parse(row.theirs)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if row.package == "Liger":
        # These have no gradients in the other library.
        used -= {"teacher", "teacher_h", "teacher_w", "old", "reference"}
    return [name for name in names()[0] if name in used]


# Running a cell.


def run(cell, scope):
    *statements, expression = cell
    scope = dict(scope)
    for statement in statements:
        exec(statement, scope)
    return eval(expression, scope)


def direction(shape):
    """The cotangent of a result that is an array, which also reduces arrays to a stored number."""
    return np.cos(1.7 * np.arange(np.prod(shape, dtype=int))).reshape(shape)


def stored_form(results):
    return [float(np.sum(np.asarray(r, np.float64) * direction(r.shape))) for r in results]


def run_jax(calls, dtype, libraries):
    """[value, gradient for each name of wrt] of each call, a pair of a cell and wrt.

    One program of several calls is compiled faster than one program for each.
    """
    arrays, others = names()
    arrays = {name: jnp.asarray(a, dtype) for name, a in arrays.items()}
    for name, value in others.items():
        if isinstance(value, np.ndarray):
            others[name] = jnp.asarray(value, dtype if value.dtype == np.float64 else None)

    def fn(chosen, cell):
        value = run(cell, {**libraries, **others, **arrays, **chosen})
        return jnp.sum(value.astype(dtype) * jnp.asarray(direction(value.shape), dtype)), value

    def program(arrays):
        for cell, wrt in calls:
            gradients, value = jax.grad(fn, has_aux=True)({n: arrays[n] for n in wrt}, cell)
            yield value, *(gradients[name] for name in wrt)

    found = jax.jit(lambda arrays: list(program(arrays)))(arrays)
    return [list(map(np.asarray, results)) for results in found]


def run_torch(cell, wrt, dtype, libraries):
    """The same with PyTorch."""
    import torch

    arrays, others = names()
    arrays = {name: torch.tensor(a, dtype=dtype) for name, a in arrays.items()}
    for name, value in others.items():
        if isinstance(value, np.ndarray):
            others[name] = torch.tensor(value)
            if value.dtype == np.float64:
                others[name] = others[name].to(dtype)
    leaves = {name: arrays[name].requires_grad_() for name in wrt}
    # Liger overwrites its input with the gradient, so the input must not be a leaf.
    inputs = {name: leaf * 1 for name, leaf in leaves.items()}
    value = run(cell, {**libraries, **arrays, **others, **inputs})
    gradients = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if value.requires_grad:  # predicted labels have no gradient
        total = (value * torch.tensor(direction(value.shape), dtype=dtype)).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
    return [np.asarray(r.detach()) for r in (value, *gradients)]


def liger():
    """Liger's functions, with their Triton kernels in Triton's interpreter on the CPU.

    The interpreter lacks two features of the compiler: it does not make a float argument a float32
    scalar, and it has no tanh, which comes from a library of the device.
    """
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    import liger_kernel.ops.cross_entropy as kernels
    import torch
    import triton.language as tl
    from liger_kernel import chunked_loss, transformers
    from liger_kernel.transformers import functional
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = with_floats
    kernels.tanh = lambda x: 1 - 2 / (tl.exp(2 * x) + 1)
    return {
        "F": torch.nn.functional,
        "liger_kl_div": functional.liger_kl_div,
        "LigerKLDIVLoss": transformers.LigerKLDIVLoss,
        "liger_jsd": functional.liger_jsd,
        "liger_fused_linear_jsd": functional.liger_fused_linear_jsd,
        "liger_fused_linear_kl_div": functional.liger_fused_linear_kl_div,
        "LigerFusedLinearJSDLoss": chunked_loss.LigerFusedLinearJSDLoss,
        "LigerFusedLinearGRPOLoss": chunked_loss.LigerFusedLinearGRPOLoss,
        "liger_cross_entropy": functional.liger_cross_entropy,
        "LigerCrossEntropyLoss": transformers.LigerCrossEntropyLoss,
        "liger_fused_linear_cross_entropy": functional.liger_fused_linear_cross_entropy,
        "LigerFusedLinearCrossEntropyLoss": transformers.LigerFusedLinearCrossEntropyLoss,
    }


def trl():
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer import utils

    names = "selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits"
    found = {name: getattr(utils, name) for name in names}
    return found | {"generalized_jsd_loss": GKDTrainer.generalized_jsd_loss}


def libraries_of(package):
    """The names that the cells of a package use, other than arrays."""
    if package == "optax":
        return {"optax": optax, "jax": jax, "jnp": jnp}
    if package == "tokamax":
        import tokamax

        return {"tokamax": tokamax}
    if package == "tunix":
        from tunix.rl import algo_core, common

        return {"algo_core": algo_core, "common": common}
    if package == "distrax":
        import distrax
        import rlax

        return {"distrax": distrax, "rlax": rlax}
    if package == "Liger":
        return liger()
    if package == "TRL":
        return trl()
    if package == "verl":
        from verl.utils import torch_functional

        return {"verl_F": torch_functional}
    import torch

    options = torch.nn.LinearCrossEntropyOptions
    return {"torch": torch, "F": torch.nn.functional, "Options": options}


def theirs(row, libraries=None):
    """The result of the other library."""
    libraries = libraries or libraries_of(row.package)
    wrt = differentiated(row)
    wide = row.package in FLOAT64
    if row.package in WITH_JAX:
        promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        with jax.enable_x64(wide), promotion[0], promotion[1]:
            calls = [([row.theirs], wrt)]
            (results,) = run_jax(calls, jnp.float64 if wide else jnp.float32, libraries)
            return results
    import torch

    dtype = torch.float64 if wide else torch.float32
    return run_torch([row.theirs], wrt, dtype, libraries)


def parameters(function, libraries):
    return list(inspect.signature(eval(function, dict(libraries))).parameters)


# The stored results: the version, the value and gradients of each call in stored_form, and the
# parameters of each function.
STORED_TEXT = """
# PyTorch: torch 2.13.0+cpu
F.cross_entropy(x, y)
    3.79098513 -0.179019381
F.cross_entropy(x, p)
    3.20661663 -0.0609829409 1.11630209
F.cross_entropy(pixels, pixel_y)
    2.30798847 0.239469228
F.cross_entropy(pixels, pixel_p)
    1.65233659 0.00252020555 0.248378227
F.cross_entropy(x[0], y[0])
    4.46788306 -1.06051041
F.cross_entropy(x, y, weight=c)
    4.22893502 0.045455446
F.cross_entropy(x, p, weight=c)
    4.83465702 -0.0865208036 1.8400161
F.cross_entropy(x, labels, ignore_index=1)
    2.96803693 -0.509419472
F.cross_entropy(x, y, reduction="sum")
    18.9549256 -0.895096903
F.cross_entropy(x, y, weight=c, reduction="none")
    3.51977363 -1.8856766
F.cross_entropy(x, y, label_smoothing=a)
    3.83529476 -0.14175552
F.cross_entropy(x, y, weight=c, label_smoothing=a)
    4.42015173 0.050506229
F.cross_entropy(x, p, weight=c, label_smoothing=a)
    5.27909652 -0.0755268219 1.47201288
F.cross_entropy(x, y, size_average=False)
    18.9549256 -0.895096903
F.cross_entropy(x, y, reduce=False)
    2.21836724 -1.17958333
F.cross_entropy(x, y, reduce=False, size_average=True)
    2.21836724 -1.17958333
F.cross_entropy(x, y, size_average=True, reduction="sum")
    3.79098513 -0.179019381
torch.nn.CrossEntropyLoss(weight=c)(x, y)
    4.22893502 0.045455446
F.nll_loss(F.log_softmax(x, dim=1), y)
    3.79098513 -0.179019381
F.linear_cross_entropy(h, w, y)
    4.06018375 -0.0714931552 -0.664473
F.linear_cross_entropy(h, w, p)
    6.35123816 1.96344589 0.46974744 -0.62600416
F.linear_cross_entropy(h, w_multi, y_multi)
    4.6995734 -0.0238638399 0.803410237
F.linear_cross_entropy(h, w, y, linear_bias=b)
    4.44295618 -0.150964369 -0.890457564 -0.500234995
F.linear_cross_entropy(h, w, y, weight=c)
    2.59054257 -0.111295703 -0.674395777
F.linear_cross_entropy(h, w, y, reduction="none")
    -0.374626149 2.90627888 2.9886686
F.linear_cross_entropy(h, w, labels, ignore_index=1)
    4.86199597 0.0377782421 -0.411568231
F.linear_cross_entropy(h, w, y, label_smoothing=a)
    4.48387047 -0.04590561 -0.645614342
F.linear_cross_entropy(h, w, y, options=Options())
    4.06018375 -0.0714931552 -0.664473
F.linear_cross_entropy(h, w, y, options=Options(batch_chunk_size=2, chunking_method=None))
    4.06018375 -0.0714931552 -0.664473
F.kl_div(x.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    0.66115923 -0.0423054672 0.0153731985
F.kl_div(x.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    0.66115923 -0.0423054672 0.0153731985
F.kl_div(teacher.log_softmax(1), x.log_softmax(1), reduction="batchmean", log_target=True)
    0.541601273 -0.0555668667 0.0423054672
t**2 * F.kl_div((x / t).log_softmax(1), (teacher / t).softmax(1), reduction="batchmean")
    0.867871122 -0.0507180833 0.0174820489
F.kl_div(x.log_softmax(1), p, reduction="batchmean")
    1.83638355 -0.0609829409 1.31571608
F.kl_div(x.log_softmax(1), teacher.softmax(1), reduction="sum")
    3.96695538 -0.253832803 0.092239191
F.kl_div(x.log_softmax(1), teacher.softmax(1), reduction="none").sum(dim=1)
    0.137867142 -1.3100927 0.755686904
F.kl_div(x.log_softmax(1), teacher.softmax(1))
    0.132231846 -0.00846109345 0.0030746397
F.kl_div(x.log_softmax(1), teacher.softmax(1), size_average=False)
    3.96695538 -0.253832803 0.092239191
F.kl_div(x.log_softmax(1), teacher.softmax(1), reduce=False).sum(dim=1)
    0.137867142 -1.3100927 0.755686904
F.kl_div(x.log_softmax(1), teacher.softmax(1), reduction="none").sum(dim=1)[rows].mean()
    0.622713408 -0.0732831831 0.118950326
torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(x.log_softmax(1), teacher.log_softmax(1))
    0.66115923 -0.0423054672 0.0153731985
x.log_softmax(1).gather(1, labels[:, None])[:, 0]
    -9.1376431 1.19792044
(x / t).log_softmax(1).gather(1, labels[:, None])[:, 0]
    -6.28449701 0.62406698
(h @ w.T / t).log_softmax(1).gather(1, labels[:, None])[:, 0]
    -0.71770222 -1.73813787 -1.1841128
torch.distributions.Categorical(logits=x).log_prob(labels)
    -9.1376431 1.19792044
torch.distributions.Categorical(logits=x).entropy()
    0.645012154 0.657631952
torch.distributions.Categorical(logits=h @ w.T).entropy()
    0.650995131 0.00655899853 0.567808206
F.cross_entropy
    input target weight size_average ignore_index reduce reduction label_smoothing
F.kl_div
    input target size_average reduce reduction log_target
F.linear_cross_entropy
    input linear_weight target linear_bias weight reduction ignore_index label_smoothing options
Options
    allow_retain_graph batch_chunk_size chunking_method acc_policy acc_dtype
torch.nn.CrossEntropyLoss
    weight size_average ignore_index reduce reduction label_smoothing
torch.nn.KLDivLoss
    size_average reduce reduction log_target
# tokamax: tokamax 0.0.17, jax 0.12.0.1 on x86_64
tokamax.linear_softmax_cross_entropy_loss(h, labels, w.T)
    21.6734581 -0.556530267 -4.88651144
tokamax.linear_softmax_cross_entropy_loss(h, labels, w.T, reduction="mean")
    3.61224318 -0.0927550754 -0.814418585
tokamax.linear_softmax_cross_entropy_loss(h, labels, w.T, reduction="none")
    0.818657697 2.73321205 1.62880328
tokamax.linear_softmax_cross_entropy_loss(h, labels, w.T, implementation="xla")
    21.6734581 -0.556530267 -4.88651144
tokamax.linear_softmax_cross_entropy_loss
    x labels weights reduction precision implementation
# Liger: liger_kernel 0.8.5, triton 3.9.0 (interpreter), torch 2.13.0+cpu
liger_fused_linear_cross_entropy(h, w, y)
    4.06018353 -0.0714931947 -0.66447296
liger_cross_entropy(x, y)
    3.79098511 -0.179019374
liger_cross_entropy(x, y, weight=c)
    4.22893524 0.0454554577
liger_cross_entropy(x, y, size_average=False)
    3.79098511 -0.179019374
liger_cross_entropy(x, labels, ignore_index=1)
    2.96803689 -0.509419477
liger_cross_entropy(x, y, reduce=False)
    3.79098511 -0.179019374
liger_cross_entropy(x, y, reduction="none")
    2.21836777 -1.17958334
liger_cross_entropy(x, y, weight=c, label_smoothing=a)
    4.42015171 0.0505062334
liger_cross_entropy(x, y, lse_square_scale=z)
    3.96157217 -0.173184466
liger_cross_entropy(x, y, weight=c, lse_square_scale=z)
    4.39952183 0.0512903696
liger_cross_entropy(x, y, softcap=s)
    2.75550699 -0.36067157
liger_cross_entropy(x, y, lse_square_scale=z, return_z_loss=True).z_loss
    0.170586959 0
liger_cross_entropy(x, y, return_token_accuracy=True).token_accuracy
    0.200000003 0
liger_cross_entropy(x, y, return_predicted_tokens=True).predicted_tokens
    -0.304727379 0
LigerCrossEntropyLoss(lse_square_scale=z)(x, y)
    3.96157217 -0.173184466
liger_fused_linear_cross_entropy(h, w, y, b)
    4.44295597 -0.150964332 -0.890457485 -0.500235031
liger_fused_linear_cross_entropy(h, w, y, ce_weight=c)
    2.59054279 -0.111295618 -0.674395815
liger_fused_linear_cross_entropy(h, w, labels, ignore_index=1)
    4.8619957 0.0377781756 -0.411568164
liger_fused_linear_cross_entropy(h, w, y, lse_square_scale=z)
    4.47213793 -0.01581027 -0.680664266
liger_fused_linear_cross_entropy(h, w, y, label_smoothing=a)
    4.48387051 -0.0459056589 -0.645614267
liger_fused_linear_cross_entropy(h, w, y, reduction="none")
    -0.37462642 2.906279 2.98866859
liger_fused_linear_cross_entropy(h, w, y, softcap=s)
    2.27371883 -0.0743550203 -0.00304872434
liger_fused_linear_cross_entropy(h, w, y, lse_square_scale=z, return_z_loss=True).z_loss
    0.411954403 0 0
liger_fused_linear_cross_entropy(h, w, y, return_token_accuracy=True).token_accuracy
    0.200000003 0 0
liger_fused_linear_cross_entropy(h, w, y, return_predicted_tokens=True).predicted_tokens
    -4.52239566 0 0
liger_fused_linear_cross_entropy(h, w, y, use_token_scaling=True)
    0.192474186 -0.0047595547 -0.0704418338
LigerFusedLinearCrossEntropyLoss(softcap=s)(w, h, y, b)
    2.3001523 -0.0454833627 -0.00571430462 -0.187577402
liger_kl_div(x.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    0.661159217 -0.0423054761
liger_kl_div(x.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    0.661159337 -0.0423054836
liger_kl_div(x.log_softmax(1), teacher.softmax(1), reduction="sum")
    3.96695542 -0.253832927
liger_kl_div(x.log_softmax(1), teacher.softmax(1))
    0.132231846 -0.00846109578
liger_kl_div(x.log_softmax(1), teacher.softmax(1), size_average=False)
    0.132231846 -0.00846109578
liger_kl_div(x.log_softmax(1), teacher.softmax(1), reduce=False)
    0.132231846 -0.00846109578
LigerKLDIVLoss(reduction="batchmean")(x.log_softmax(1), teacher.softmax(1))
    0.661159217 -0.0423054761
liger_jsd(x.log_softmax(1), teacher.log_softmax(1))
    0.133591548 -0.0119959188
liger_jsd(x.log_softmax(1), teacher.log_softmax(1), y)
    0.127821922 0.0209691683
liger_jsd(x.log_softmax(1), teacher.log_softmax(1), y, beta=0.3)
    0.112514399 0.0194307878
liger_jsd(x.log_softmax(1), teacher.log_softmax(1), beta=0.0)
    0.661159337 -0.042305481
liger_jsd(x.log_softmax(1), teacher.log_softmax(1), beta=1.0)
    0.5416013 -0.0555668271
liger_jsd(x.log_softmax(1), teacher.log_softmax(1), labels, ignore_index=1)
    0.120491818 -0.0119279966
liger_fused_linear_jsd(h, w, teacher_h, teacher_w)
    0.363594413 0.0164114805 0.0521832121
liger_fused_linear_jsd(h, w, teacher_h, teacher_w, y)
    0.373958945 0.0181507852 0.0502431118
liger_fused_linear_jsd(h, w, teacher_h, teacher_w, y, jsd_beta=0.3)
    0.335904688 0.0116164616 0.0351542492
liger_fused_linear_jsd(h, w, teacher_h, teacher_w, jsd_beta=0.0)
    6.39062691 0.261034527 -0.533475141
liger_fused_linear_jsd(h, w, teacher_h, teacher_w, jsd_beta=1.0)
    4.13999844 0.263841162 0.496522963
liger_fused_linear_jsd(h, w, teacher_h, teacher_w, labels, ignore_index=1)
    0.367440015 0.0113032603 0.0252568055
liger_fused_linear_jsd(h, w, teacher_h, teacher_w, temperature=t)
    0.335434079 0.0066872979 0.034425406
liger_fused_linear_kl_div(h, w, teacher.softmax(1))
    6.01294041 0.182806868 -0.506685558
liger_fused_linear_kl_div(h, w, teacher.softmax(1), y, reduction="sum")
    26.8335533 2.01897944 -2.04370288
liger_fused_linear_kl_div(h, w, teacher.softmax(1), labels, ignore_index=1)
    6.07652903 0.210582424 -0.645582073
liger_fused_linear_kl_div(h, w, teacher.softmax(1), reduction="mean")
    1.2025882 0.036561389 -0.101337104
liger_fused_linear_kl_div(h, w, teacher.softmax(1), temperature=t)
    3.94820642 0.153973644 -0.280043311
LigerFusedLinearJSDLoss(weight_hard_loss=0.2, weight_soft_loss=0.8, compiled=False)(h, w, teacher_h, teacher_w, y)
    1.11120391 0.000221997209 -0.0927001075
LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.3, compiled=False)(h, w, teacher_h, teacher_w, y)
    0.335904688 0.0116164668 0.0351542414
LigerFusedLinearJSDLoss(0.0, 1.0, ignore_index=1, compiled=False)(h, w, teacher_h, teacher_w, labels)
    0.367440045 0.0113032622 0.0252568229
LigerFusedLinearJSDLoss(0.0, 1.0, temperature=t, compiled=False)(h, w, teacher_h, teacher_w, y)
    0.341406941 0.00737239443 0.033685655
LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False)(h, w, teacher_h, teacher_w, y, b)
    0.363826334 0.012548488 0.0265415899 -0.0532101556
LigerFusedLinearJSDLoss(0.0, 1.0, chunk_size=2, compiled=False)(h, w, teacher_h, teacher_w, y)
    0.373958945 0.0181507801 0.0502431261
LigerFusedLinearGRPOLoss(loss_type="grpo", temperature=t, compiled=False)(hidden, w, tokens, mask, advantages, None, reference, old)[0]
    0.0591727793 0.224160146 -0.0118800247
LigerFusedLinearGRPOLoss(temperature=t, compiled=False)(hidden, w, tokens, mask, advantages, None, reference, old)[0]
    -0.110790789 0.153457597 -0.0289246256
LigerCrossEntropyLoss
    weight ignore_index lse_square_scale label_smoothing reduction softcap return_z_loss
    return_token_accuracy return_predicted_tokens
LigerFusedLinearCrossEntropyLoss
    ce_weight ignore_index lse_square_scale label_smoothing reduction softcap return_z_loss
    accum_dtype use_token_scaling return_token_accuracy return_predicted_tokens
LigerFusedLinearJSDLoss
    weight_hard_loss weight_soft_loss beta ignore_index temperature compiled chunk_size
    return_soft_hard_loss
LigerKLDIVLoss
    eps args kwargs
liger_cross_entropy
    input target weight size_average ignore_index reduce reduction label_smoothing lse_square_scale
    softcap return_z_loss return_token_accuracy return_predicted_tokens
liger_fused_linear_cross_entropy
    input weight target bias ce_weight ignore_index lse_square_scale label_smoothing reduction
    softcap return_z_loss accum_dtype use_token_scaling return_token_accuracy
    return_predicted_tokens chunk_mem_const
liger_fused_linear_jsd
    student_input student_weight teacher_input teacher_weight shift_labels jsd_beta ignore_index
    temperature accum_dtype
liger_fused_linear_kl_div
    student_input student_weight target shift_labels reduction ignore_index temperature eps
    accum_dtype
liger_jsd
    input target shift_labels beta ignore_index
liger_kl_div
    input target size_average reduce reduction log_target eps
# TRL: trl 1.16.0, torch 2.13.0+cpu
selective_log_softmax_and_entropy(x, labels)[1]
    0.645012154 0.657631952
selective_log_softmax(x, labels)
    -9.1376431 1.19792044
selective_log_softmax(x, labels[:, None])
    -9.1376431 1.19792044
selective_log_softmax(x, labels, temperature=t)
    -6.28449701 0.62406698
selective_log_softmax(x, labels, row_mask=rows)
    -3.13094418 1.03236806
selective_log_softmax_and_entropy(x, labels, temperature=t, row_mask=rows)[1]
    -0.0659943006 0.195731536
selective_log_softmax_and_entropy(x, labels, entropy_requires_grad=False)[1]
    0.645012154 0
entropy_from_logits(x)
    0.645012154 0.657631952
generalized_jsd_loss(x, teacher)
    0.133591527 -0.0119959147 0.00635196266
generalized_jsd_loss(x, teacher, y)
    0.127821893 0.0209691739 -0.0232882261
generalized_jsd_loss(x, teacher, y, beta=0.3)
    0.112514409 0.0194307858 -0.0184777174
generalized_jsd_loss(x, teacher, beta=0)
    0.66115923 -0.0423054672 0.0153731985
generalized_jsd_loss(x, teacher, beta=1)
    0.541601273 -0.0555668667 0.0423054672
generalized_jsd_loss(x, teacher, temperature=t)
    0.0832810168 -0.00637839861 0.00392425475
generalized_jsd_loss(x, teacher, y, reduction="sum")
    0.639109465 0.104845869 -0.116441131
generalized_jsd_loss(x, teacher, reduction="none").sum(dim=-1)
    0.0693500698 -0.292427278 0.24361132
generalized_jsd_loss(x, teacher, y, num_items_in_batch=8)
    0.0798886832 0.0131057337 -0.0145551413
entropy_from_logits
    logits chunk_size
generalized_jsd_loss
    student_logits teacher_logits labels beta temperature reduction num_items_in_batch
selective_log_softmax
    logits index temperature row_mask
selective_log_softmax_and_entropy
    logits index entropy_requires_grad temperature row_mask
# verl: verl 0.9.0, torch 2.13.0+cpu
verl_F.logprobs_from_logits(x, labels)
    -9.1376431 1.19792044
verl_F.entropy_from_logits(x)
    0.645012154 0.657631952
verl_F.entropy_from_logits
    logits
verl_F.logprobs_from_logits
    logits labels inplace_backward
# tunix: google-tunix 0.1.7, jax 0.10.2 on x86_64
common.selective_log_softmax(x, labels)
    -9.13764321 1.19792046
algo_core.compute_entropy_from_logits(x)
    0.645012147 0.657631919
common.compute_kl_divergence(old, reference)
    -0.628725921 1.00267526 -1.00267526
common.compute_kl_divergence(old, reference, method="mse_kl")
    -0.554733833 1.52416991 -1.52416991
common.compute_kl_divergence(old, reference, clamp_value=1.0)
    -0.367666084 1.08203895 -1.08203895
algo_core.compute_entropy_from_logits
    logits
common.compute_kl_divergence
    per_token_logps ref_per_token_logps method clamp_value
common.selective_log_softmax
    logits input_ids
# distrax: distrax 0.1.9, rlax 0.1.9, jax 0.10.2 on x86_64
distrax.Categorical(logits=x).log_prob(labels)
    -9.1376431 1.19792044
distrax.Categorical(logits=x).entropy()
    0.645012154 0.657631952
distrax.Softmax(x, t).entropy()
    0.548848348 0.404984619
distrax.Categorical(logits=x).kl_divergence(distrax.Categorical(logits=teacher))
    0.456678746 -1.25586365 1.3100927
distrax.Categorical(logits=teacher).kl_divergence(distrax.Categorical(logits=x))
    0.137867142 -1.3100927 0.755686904
rlax.categorical_kl_divergence(x, teacher, t)
    0.200188795 -0.556252404 0.491251415
"""  # noqa: E501


def parse(text):
    """{call or function: its stored results}, and {package: its version}."""
    values, versions, key = {}, {}, None
    for line in text.splitlines():
        if line.startswith("# "):
            package, versions_of = line[2:].split(": ")
            versions[package] = versions_of
        elif line.startswith("    "):
            values[key] += line.split()
        elif line:
            key = line
            values[key] = []
    return values, versions


STORED, VERSIONS = parse(STORED_TEXT)


def store(package):
    """The lines of STORED_TEXT for an installed package."""
    libraries = libraries_of(package)
    lines = [f"# {package}: {version_of(package)}"]

    def add(key, values):
        wrapped = textwrap.wrap(" ".join(values), 96, break_on_hyphens=False)
        lines.extend([key, *("    " + line for line in wrapped)])

    for row in {row.theirs: row for row in CALLS if row.package == package}.values():
        numbers = stored_form(theirs(row, libraries))
        add(row.theirs, [f"{number:.9g}" for number in numbers])
    for function in functions(package):
        add(function, parameters(function, libraries))
    return "\n".join(lines)


def printed_by(package):
    """The same, from a process without other imports and with default settings."""
    command = [sys.executable, __file__, package]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def version_of(package):
    from importlib.metadata import version

    distribution = DISTRIBUTIONS.get(package, MODULES[package])
    found = f"{distribution} {version(distribution)}"
    if package == "Liger":
        found += f", triton {version('triton')} (interpreter), torch {version('torch')}"
    if package in ("TRL", "verl"):
        found += f", torch {version('torch')}"
    if package == "distrax":
        found += f", rlax {version('rlax')}"
    if package in WITH_JAX:
        found += f", jax {version('jax')} on {platform.machine()}"
    return found


def functions(package):
    return sorted({f for row in ROWS if row.package == package for f in row.functions})


# The tests.


OF_SXE = list(dict.fromkeys((tuple(row.ours), tuple(differentiated(row))) for row in CALLS))
TOGETHER = 8  # calls in one program: the tests of neighboring rows run in the same process


def of_sxe(cell, wrt):
    group, place = divmod(OF_SXE.index((cell, wrt)), TOGETHER)
    return group_of_sxe(group)[place]


@functools.cache  # rows share calls of sxe, and compiling them takes most of the time
def group_of_sxe(group):
    calls = OF_SXE[group * TOGETHER : (group + 1) * TOGETHER]
    return run_jax(calls, jnp.float32, {"jax": jax, "jnp": jnp, "sxe": sxe})


@pytest.mark.parametrize("row", CALLS, ids=lambda row: row.theirs)
def test_sxe_gives_the_same_value_and_gradients(row):
    ours = of_sxe(tuple(row.ours), tuple(differentiated(row)))
    for result in ours:
        assert np.isfinite(result).all()
    if row.package == "optax":
        for result, expected in zip(ours, theirs(row), strict=True):
            # The other library has NaN or infinite derivatives by targets where sxe has 0.
            expected = np.where(np.isfinite(expected), expected, 0)
            assert_close(result, expected)
        return
    assert row.theirs in STORED, "python tests/test_migration.py prints what to store"
    expected = [float(number) for number in STORED[row.theirs]]
    for result, got, value in zip(ours, stored_form(ours), expected, strict=True):
        tolerance = TOLERANCE[row.package] * np.abs(result.astype(np.float64)).sum()
        assert abs(got - value) <= tolerance, (got, value)


@pytest.mark.slow
@pytest.mark.parametrize("package", [p for p in MODULES if p != "optax"])
def test_what_is_stored_is_what_the_package_gives(package):
    if importlib.util.find_spec(MODULES[package]) is None:
        pytest.skip(f"{MODULES[package]} is not installed")
    values, versions = parse(printed_by(package))
    assert versions[package].split(",")[0] == VERSIONS[package].split(",")[0]
    for key, value in values.items():
        if key in functions(package):
            assert value == STORED[key]
        else:
            np.testing.assert_allclose(
                np.float64(value), np.float64(STORED[key]), rtol=1e-5, atol=1e-6, err_msg=key
            )


def test_nothing_is_stored_that_the_document_does_not_have():
    calls = {row.theirs for row in CALLS if row.package != "optax"}
    assert STORED.keys() == calls | {f for p in MODULES if p != "optax" for f in functions(p)}
    assert VERSIONS.keys() == MODULES.keys() - {"optax"}
    text = DOCUMENT.read_text(encoding="utf-8")
    for version in VERSIONS.values():
        assert f"Checked with {re.split(r'[,+]', version)[0]}" in text  # the package itself


@pytest.mark.parametrize(
    "function", [(p, f) for p in MODULES for f in functions(p)], ids=lambda pair: pair[1]
)
def test_every_argument_has_a_row(function):
    package, name = function
    wanted = parameters(name, {"optax": optax}) if package == "optax" else STORED[name]
    rows = [argument for row in ROWS if name in row.functions for argument in code(row.arguments)]
    assert set(wanted) <= set(rows)


def test_every_row_is_run_or_says_why_not():
    for row in ROWS:
        if row.text.startswith(NO_COUNTERPART):
            assert not row.theirs, row
            assert len(row.text) > 20, row
        else:
            assert row.theirs, row
            assert row.ours, row
            assert not re.sub(r"`[^`]+`|<br>", "", row.text), row  # all text in the cell is run
    lines = re.findall(r"^\|.*", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == sum(len(table) + 2 for *_, table in tables())
    assert sorted(LEGEND) == sorted({**names()[0], **names()[1]})


def test_the_example_runs(tmp_path):
    done = run_example("port_from_torch.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    installed = importlib.util.find_spec("torch") is not None
    assert done.stdout.startswith("torch " if installed else "PyTorch is not installed: ")
    found = re.search(r"largest relative difference: (\S+)", done.stdout)
    assert 0 < float(found[1]) < 1e-5
    assert (
        len(re.findall(r"^\S.*  \d+\.\d{6}  .*e[-+]\d\d$", done.stdout, re.MULTILINE)) == 9
    )  # pairs


if __name__ == "__main__":
    if sys.argv[1:]:
        print(store(*sys.argv[1:]))
    else:
        for package, module in MODULES.items():
            if package != "optax" and importlib.util.find_spec(module):
                print(printed_by(package), end="")
