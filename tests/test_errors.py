"""Errors for mistakes that a new user would make.

Each error names the argument, what was expected and what came. It also tells what to do, if that
is not obvious.
"""

import pickle
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sxe
from sxe.__main__ import main

N, D, K = 6, 2, 5
LOGITS, LABELS = np.zeros((N, K), np.float32), np.zeros(N, np.int32)
HIDDEN, KERNEL = np.zeros((N, D), np.float32), np.zeros((D, K), np.float32)
NAN, INF = float("nan"), float("inf")


def says(argument, error, message):
    """Expect an error whose whole text is one line, 'argument: ' and a match of ``message``.

    Below a ruler, JAX may append a note on how it filters tracebacks.
    """
    return pytest.raises(error, match=rf"\A{argument}: {message}(\Z|\n-{{5,}}\n)")


def named(cases):
    """Parametrize by the argument, other arguments of the call, the error, and its message."""
    ids = [f"{argument}: {'; '.join(map(str, given))}" for argument, given, *_ in cases]
    return pytest.mark.parametrize(
        ("argument", "given", "error", "message"), cases, ids=[i[:40] for i in ids]
    )


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


# Options of all losses.

ARRAY, DTYPE = (
    "expected an array, got ",
    "expected dtype bfloat16, float16, float32 or float64, got ",
)
NUMBER = r"expected a number in \[0, 1\] \(0.0 turns it off\)"
AT_LEAST_0 = r"expected a finite number of at least 0 \(0.0 turns it off\)"
OR_ARRAY = ", or a scalar float array, got "
INDICES = (
    r"expected shape \(6,\) of integers \(class indices\) or \(6, 5\) of floats \(dense targets\)"
)
ONE_HOT = r"cast one-hot labels to a float dtype, or pass jnp.argmax\(labels, axis=-1\)"
SEVERAL = "; for several labels per row, pass label_weights of shape {}"
BROADCAST = r"; sxe does not broadcast it: pass jnp.broadcast_to"
CAST = "expected a float dtype, got {}; cast it to a float dtype"
ROW_MASK = "; to mask rows, pass where={}; otherwise cast it to a float dtype"
TRACED = "got .*Tracer.*; it is static: .* or name {} in jax.jit's static_argnames"
ONE_OF = "expected one of 'vjp', 'jvp', 'autodiff', got "
OUTSIDE = "expected a mesh axis of an enclosing jax.shard_map, got 'x'; for global .* sxe.over_mesh"
MESH_AXIS = "expected the name of a mesh axis or a tuple of names, got "

SHARED = [
    ("labels", {"labels": None}, TypeError, f"{ARRAY}None"),
    ("labels", {"labels": ["cat"] * N}, TypeError, rf"{ARRAY}\['cat', .*\]"),
    ("labels", {"labels": zeros(N, dtype=bool)}, TypeError, "expected .* bool; cast them .*"),
    ("labels", {"labels": zeros(N, K, dtype=bool)}, TypeError, f"expected .* got bool; {ONE_HOT}"),
    ("labels", {"labels": zeros(N, K, dtype=complex)}, TypeError, "expected .* got complex64; .*"),
    ("labels", {"labels": zeros(4, dtype=int)}, ValueError, rf"{INDICES}, got \(4,\) of int32"),
    (
        "labels",
        {"labels": 1},
        ValueError,
        rf"{INDICES}, got \(\) of int32{BROADCAST}\(labels, \(6,\)\)",
    ),
    ("labels", {"labels": zeros(N, 4)}, ValueError, rf"{INDICES}, got \(6, 4\) of float32"),
    (
        "labels",
        {"labels": zeros(1, K)},
        ValueError,
        rf"{INDICES}, got \(1, 5\) of float32{BROADCAST}\(labels, \(6, 5\)\)",
    ),
    (
        "labels",
        {"labels": zeros(N, K, dtype=int)},
        ValueError,
        rf"{INDICES}, got \(6, 5\) of int32; {ONE_HOT}" + SEVERAL.format(r"\(6, 5\)"),
    ),
    (
        "labels",
        {"labels": zeros(N, 3, dtype=int)},
        ValueError,
        rf"{INDICES}, got \(6, 3\) of int32" + SEVERAL.format(r"\(6, 3\)"),
    ),
    (
        "label_weights",
        {"label_weights": "many"},
        TypeError,
        f"{ARRAY}'many'",
    ),
    (
        "label_weights",
        {"labels": zeros(N, K), "label_weights": zeros(N, K)},
        ValueError,
        r"expected None with labels of float32 \(dense targets\), got shape \(6, 5\); pass class "
        "indices of an integer dtype, or put the weights into the dense targets",
    ),
    (
        "labels",
        {"label_weights": zeros(N)},
        ValueError,
        r"expected shape \(6, M\) with label_weights, M labels per row along the last axis, "
        r"got \(6,\); for one label per row, pass labels\[..., None\] and label_weights of that "
        "shape; to weight rows, pass weights instead",
    ),
    (
        "labels",
        {"labels": zeros(3, N, dtype=int), "label_weights": zeros(3, N)},
        ValueError,
        r"expected shape \(6, M\) with label_weights, .*, got \(3, 6\); pass "
        r"jnp.moveaxis\(labels, 0, -1\)",
    ),
    (
        "weights",
        {
            "labels": zeros(N, 3, dtype=int),
            "label_weights": zeros(N, 3),
            "weights": zeros(N, 3),
        },
        ValueError,
        r"expected shape \(6,\), one value per row, got \(6, 3\); to weight single labels, "
        "multiply label_weights by these weights",
    ),
    (
        "label_weights",
        {"labels": zeros(N, 3, dtype=int), "label_weights": zeros(3)},
        ValueError,
        rf"expected shape \(6, 3\), one value per label, got \(3,\){BROADCAST}"
        r"\(label_weights, \(6, 3\)\)",
    ),
    (
        "label_weights",
        {"labels": zeros(N, 3, dtype=int), "label_weights": zeros(N)},
        ValueError,
        r"expected shape \(6, 3\), one value per label, got \(6,\); to weight rows, pass "
        rf"weights{BROADCAST}\(label_weights\[:, None\], \(6, 3\)\)",
    ),
    (
        "label_weights",
        {"labels": zeros(N, 3, dtype=int), "label_weights": zeros(N, 3, dtype=int)},
        TypeError,
        CAST.format("int32"),
    ),
    (
        "ignore_index",
        {"labels": zeros(N, 3, dtype=int), "label_weights": zeros(N, 3), "ignore_index": -1},
        ValueError,
        "expected None with label_weights, got -1; mask rows with where, and give padding labels "
        "a weight of 0",
    ),
    (
        "labels",
        {"labels": [[0, 1, 0, 0, 0]] * N},
        ValueError,
        rf"{INDICES}, got \(6, 5\) of int32; {ONE_HOT}" + SEVERAL.format(r"\(6, 5\)"),
    ),
    (
        "labels",
        {"labels": zeros(N)},
        ValueError,
        rf"{INDICES}, got \(6,\) of float32; cast class indices to an integer dtype",
    ),
    (
        "labels",
        {"labels": zeros(N, 1, dtype=int)},
        ValueError,
        rf"{INDICES}, got \(6, 1\) of int32; pass labels\[..., 0\]",
    ),
    ("where", {"where": "all"}, TypeError, f"{ARRAY}'all'"),
    ("where", {"where": zeros(N)}, TypeError, "expected dtype bool, got float32; pass where != 0"),
    (
        "where",
        {"where": zeros(N, 1, dtype=bool)},
        ValueError,
        r"expected a mask of .*, got \(6, 1\); pass where\[..., 0\]",
    ),
    (
        "where",
        {"where": True},
        ValueError,
        rf"expected a mask of shape \(6,\) \(rows\).*, got \(\){BROADCAST}\(where, \(6,\)\)",
    ),
    ("weights", {"weights": {}}, TypeError, f"{ARRAY}{{}}"),
    (
        "weights",
        {"weights": [1] * N},
        TypeError,
        f"expected a float dtype, got int32{ROW_MASK.format('weights != 0')}",
    ),
    (
        "weights",
        {"weights": zeros(N, dtype=bool)},
        TypeError,
        f"expected a float dtype, got bool{ROW_MASK.format('weights')}",
    ),
    (
        "weights",
        {"weights": zeros(N, 1)},
        ValueError,
        r"expected shape \(6,\), one value per row, got \(6, 1\); pass weights\[..., 0\]",
    ),
    (
        "weights",
        {"weights": zeros(K)},
        ValueError,
        r"expected shape \(6,\), .*, got \(5,\); to weight classes, pass class_weights",
    ),
    ("class_mask", {"class_mask": "padding"}, TypeError, f"{ARRAY}'padding'"),
    (
        "class_mask",
        {"class_mask": [1] * K},
        TypeError,
        "expected dtype bool, got int32; pass class_mask != 0",
    ),
    (
        "class_mask",
        {"class_mask": zeros(N, dtype=bool)},
        ValueError,
        r"expected shape \(5,\), one value per class, got \(6,\); to mask rows, pass where",
    ),
    (
        "class_mask",
        {"class_mask": zeros(1, K, dtype=bool)},
        ValueError,
        r"expected shape \(5,\), .*, got \(1, 5\);.* pass class_mask\[0\]",
    ),
    ("class_weights", {"class_weights": {0: 1.0}}, TypeError, rf"{ARRAY}{{0: 1.0}}"),
    ("class_weights", {"class_weights": [1] * K}, TypeError, CAST.format("int32")),
    (
        "class_weights",
        {"class_weights": zeros(1, K)},
        ValueError,
        r"expected shape \(5,\), one value per class, got \(1, 5\); pass class_weights\[0\]",
    ),
    (
        "class_weights",
        {"class_weights": zeros(4)},
        ValueError,
        r"expected shape \(5,\), one value per class, got \(4,\)",
    ),
    (
        "class_weights",
        {"class_weights": zeros(N)},
        ValueError,
        r"expected shape \(5,\), .*, got \(6,\); to weight rows, pass weights",
    ),
    ("label_smoothing", {"label_smoothing": 10}, ValueError, f"{NUMBER}, got 10"),
    ("label_smoothing", {"label_smoothing": -0.1}, ValueError, f"{NUMBER}, got -0.1"),
    ("label_smoothing", {"label_smoothing": NAN}, ValueError, f"{NUMBER}, got nan"),
    ("label_smoothing", {"label_smoothing": "0.1"}, TypeError, f"{NUMBER}{OR_ARRAY}'0.1'"),
    ("label_smoothing", {"label_smoothing": None}, TypeError, f"{NUMBER}{OR_ARRAY}None"),
    ("label_smoothing", {"label_smoothing": True}, TypeError, f"{NUMBER}{OR_ARRAY}True"),
    (
        "label_smoothing",
        {"label_smoothing": zeros(2)},
        ValueError,
        r"expected a scalar, got shape \(2,\)",
    ),
    (
        "label_smoothing",
        {"label_smoothing": zeros(1)},
        ValueError,
        r"expected a scalar, got shape \(1,\); pass label_smoothing\[0\]",
    ),
    (
        "z_loss",
        {"z_loss": zeros(1, 1)},
        ValueError,
        r"expected a scalar, got shape \(1, 1\); pass z_loss.reshape\(\(\)\)",
    ),
    (
        "label_smoothing",
        {"label_smoothing": np.asarray(0)},
        TypeError,
        rf"{NUMBER}{OR_ARRAY}array\(0\); cast it to a float dtype",
    ),
    ("label_smoothing", {"label_smoothing": np.asarray(1.5)}, ValueError, f"{NUMBER}, got 1.5"),
    (
        "label_smoothing",
        {"label_smoothing": np.asarray(-0.5, jnp.bfloat16)},
        ValueError,
        f"{NUMBER}, got -0.5",
    ),
    ("z_loss", {"z_loss": np.asarray(INF, np.float16)}, ValueError, f"{AT_LEAST_0}, got inf"),
    ("z_loss", {"z_loss": np.asarray(-1, jnp.bfloat16)[()]}, ValueError, f"{AT_LEAST_0}, got -1.0"),
    ("z_loss", {"z_loss": 10**400}, ValueError, f"{AT_LEAST_0}, got 1000*"),
    ("z_loss", {"z_loss": -1e-4}, ValueError, f"{AT_LEAST_0}, got -0.0001"),
    ("z_loss", {"z_loss": INF}, ValueError, f"{AT_LEAST_0}, got inf"),
    ("z_loss", {"z_loss": None}, TypeError, f"{AT_LEAST_0}{OR_ARRAY}None"),
    ("ignore_index", {"ignore_index": -1.0}, TypeError, "expected an int or None, got -1.0"),
    ("ignore_index", {"ignore_index": True}, TypeError, "expected an int or None, got True"),
    ("ignore_index", {"ignore_index": [1, 2]}, TypeError, r"expected an int .*, got \[1, 2\]"),
    (
        "ignore_index",
        {"labels": zeros(N, K), "ignore_index": -1},
        ValueError,
        "expected None with dense targets, got -1; mask rows with where",
    ),
    ("reduction", {"reduction": "average"}, ValueError, "expected one of .*, got 'average'"),
    ("reduction", {"reduction": "Mean"}, ValueError, "expected .*'Mean'; did you mean 'mean'\\?"),
    ("reduction", {"reduction": np.zeros(2)}, ValueError, r"expected .*, got array\(.*\)"),
    ("return_metrics", {"return_metrics": "no"}, TypeError, "expected True or False, got 'no'"),
    ("axis_name", {"axis_name": 3}, TypeError, f"{MESH_AXIS}3"),
    ("axis_name", {"axis_name": P("x")}, TypeError, rf"{MESH_AXIS}P.*\('x',\)"),
    (
        "axis_name",
        {"axis_name": ("x", "x")},
        ValueError,
        r"expected each mesh axis at most once, got \('x', 'x'\)",
    ),
    ("axis_name", {"axis_name": "x"}, ValueError, OUTSIDE),
    ("batch_axis_name", {"batch_axis_name": "x"}, ValueError, OUTSIDE),
    (
        "batch_axis_name",
        {"axis_name": "x", "batch_axis_name": ("y", "x")},
        ValueError,
        r"expected mesh axes that axis_name does not contain, got \['x'\] in both",
    ),
]

RULES = [
    ("rule", {"rule": "hessian"}, ValueError, f"{ONE_OF}'hessian'"),
    ("rule", {"rule": "JVP"}, ValueError, rf"{ONE_OF}'JVP'; did you mean 'jvp'\?"),
]

# The losses of logits.

IMAGES = zeros(2, K, 4, 3)  # with PyTorch's class axis
IN_ORDER = "; the order of arguments is logits, labels"
RECAST = "; cast it to one of these dtypes"
AXIS = "expected an int or a tuple of ints, got "

OF_LOGITS = [
    ("logits", {"logits": None}, TypeError, f"{ARRAY}None"),
    ("logits", {"logits": [[1.0, 2.0], [3.0]]}, TypeError, rf"{ARRAY}\[\[1.0, 2.0\], \[3.0\]\]"),
    (
        "logits",
        {"logits": zeros(2, dtype=object)},
        TypeError,
        rf"{ARRAY}array\(.*object\); JAX does not support dtype object: cast it",
    ),
    (
        "labels",
        {"labels": np.ma.masked_less(LABELS, 3)},
        TypeError,
        rf"{ARRAY}masked_array\(.*\); pass labels.filled\(0\), "
        "and the rows that are not masked as where",
    ),
    (
        "logits",
        {"logits": {"logits": LOGITS}},
        TypeError,
        rf"{ARRAY}{{'logits': .*}}; pass one of the arrays that it contains",
    ),
    (
        "logits",
        {"logits": jax.ShapeDtypeStruct((N, K), np.float32)},
        TypeError,
        rf"{ARRAY}an object of type ShapeDtypeStruct; to compute shapes only, call jax.eval_shape",
    ),
    ("logits", {"logits": (LOGITS, {})}, TypeError, rf"{ARRAY}\(array\(.*\), {{}}\)"),
    ("logits", {"logits": [[1, 2]]}, TypeError, f"{DTYPE}int32{IN_ORDER}"),
    ("logits", {"logits": LABELS, "labels": LOGITS}, TypeError, f"{DTYPE}int32{IN_ORDER}"),
    (
        "logits",
        {"logits": zeros(N, K, dtype=complex)},
        TypeError,
        f"{DTYPE}complex64{RECAST}",
    ),
    (
        "logits",
        {"logits": zeros(N, K, dtype=jnp.float8_e4m3fn)},
        TypeError,
        f"{DTYPE}float8_e4m3fn{RECAST}",
    ),
    ("logits", {"logits": 1.0}, ValueError, "expected at least one axis, got a scalar"),
    (
        "labels",
        {"logits": zeros(N)},
        ValueError,
        rf"expected .*, got \(6,\) of int32; logits of shape \(6,\) are a single row; {ONE_HOT}"
        + SEVERAL.format(r"\(6,\)"),
    ),
    (
        "logits",
        {"logits": zeros(N, 0)},
        ValueError,
        r"expected at least one class along axis -1, got shape \(6, 0\)",
    ),
    (
        "labels",
        {"logits": IMAGES, "labels": zeros(2, 4, 3, dtype=int)},
        ValueError,
        r"expected .*\(2, 5, 4\).*, got \(2, 4, 3\).*; if the .* along axis 1, pass axis=1",
    ),
    (
        "where",
        {"where": zeros(K, dtype=bool)},
        ValueError,
        r"expected a mask of shape \(6,\) \(rows\) or \(6, 5\) \(classes\), got \(5,\)"
        rf"{BROADCAST}\(where, \(6, 5\)\)",
    ),
    (
        "labels",
        {"logits": IMAGES, "labels": zeros(2, K, 4, 3, dtype=int), "axis": 1},
        ValueError,
        r"expected .*\(2, 5, 4, 3\) of int32; cast .*, or pass jnp.argmax\(labels, axis=1\)",
    ),
    (
        "labels",
        {"logits": IMAGES, "labels": zeros(2, K, 4, 3, dtype=int), "axis": (1, 2)},
        ValueError,
        r"expected .*\(2, 5, 4, 3\) of int32; cast one-hot labels to a float dtype",
    ),
    ("axis", {"axis": 2}, ValueError, r"expected axes in \[-2, 2\) for .* 2 dimensions, got 2"),
    ("axis", {"axis": -3}, ValueError, r"expected axes in \[-2, 2\) .*, got -3"),
    ("axis", {"axis": (1, -1)}, ValueError, r"expected .* different ones, got \(1, -1\) .*"),
    ("axis", {"axis": ()}, ValueError, r"expected one axis or several different ones, got \(\) .*"),
    ("axis", {"axis": 1.0}, TypeError, f"{AXIS}1.0"),
    ("axis", {"axis": True}, TypeError, f"{AXIS}True"),
    ("axis", {"axis": None}, TypeError, f"{AXIS}None"),
    ("axis", {"axis": {1}}, TypeError, rf"{AXIS}\{{1}}"),
    ("axis", {"axis": np.zeros(1, int)}, TypeError, rf"{AXIS}array\(\[0\]\)"),
]


@named([*SHARED, *RULES, *OF_LOGITS])
def test_logits(argument, given, error, message):
    arguments = {"logits": LOGITS, "labels": LABELS} | given
    losses = [sxe.softmax_cross_entropy]
    if argument != "rule":
        losses.append(sxe.softmax_cross_entropy_with_gradient)
    for loss in losses:
        with says(argument, error, message):
            loss(**arguments)
        with says(argument, error, message):
            jax.eval_shape(lambda loss=loss: loss(**arguments))


def test_the_pass_with_gradient_has_no_rows():
    with says("reduction", ValueError, "expected one of 'mean', 'sum', got 'none'"):
        sxe.softmax_cross_entropy_with_gradient(LOGITS, LABELS, reduction="none")


def test_a_program_of_an_axis_that_is_equal_is_not_taken():
    """1 == 1.0 == True, so jax.jit's cache does not distinguish them. The check must."""
    jax.eval_shape(lambda: sxe.softmax_cross_entropy(LOGITS, LABELS, axis=1))
    for axis in (1.0, True):
        with says("axis", TypeError, f"{AXIS}{axis}"):
            sxe.softmax_cross_entropy(LOGITS, LABELS, axis=axis)


# The head: the fused final linear layer and loss.

SHAPE = r"expected shape \[D, K\] with D = 2, the size of the last axis of hidden \(6, 2\), got "
HEAD_ORDER = "; the order of arguments is hidden, kernel, labels"
FINITE = r"expected a finite number \(1.0 turns it off\)"
ABOVE_0 = r"expected a number above 0 \(None turns it off\)"
OUT_OF_ALL = (
    "to mask classes in all rows, pass class_mask; to mask them in some rows only, "
    "pass logits to sxe.softmax_cross_entropy"
)

OF_HEAD = [
    ("hidden", {"hidden": {}}, TypeError, f"{ARRAY}{{}}"),
    ("hidden", {"hidden": zeros(N, D, dtype=int)}, TypeError, f"{DTYPE}int32{HEAD_ORDER}"),
    ("hidden", {"hidden": 1.0}, ValueError, "expected at least one axis, got a scalar"),
    ("kernel", {"kernel": {"kernel": 1}}, TypeError, rf"{ARRAY}{{'kernel': 1}}"),
    ("kernel", {"kernel": LABELS, "labels": KERNEL}, TypeError, f"{DTYPE}int32{HEAD_ORDER}"),
    (
        "kernel",
        {"hidden": KERNEL, "kernel": HIDDEN},
        ValueError,
        rf"expected .* D = 5, .* last axis of hidden \(2, 5\), got \(6, 2\){HEAD_ORDER}",
    ),
    ("kernel", {"kernel": zeros(D)}, ValueError, rf"{SHAPE}\(2,\)"),
    ("kernel", {"kernel": zeros(1, D, K)}, ValueError, rf"{SHAPE}\(1, 2, 5\)"),
    (
        "kernel",
        {"kernel": KERNEL.T},
        ValueError,
        rf"{SHAPE}\(5, 2\); for an embedding \[K, D\], pass its transpose, embedding.T",
    ),
    ("kernel", {"kernel": zeros(D, 0)}, ValueError, r"expected .* one class, got \(2, 0\)"),
    ("bias", {"bias": "none"}, TypeError, f"{ARRAY}'none'"),
    ("bias", {"bias": zeros(K, dtype=int)}, TypeError, CAST.format("int32")),
    (
        "bias",
        {"bias": False},
        ValueError,
        r"expected shape \(5,\), one value per class, or None, got a scalar",
    ),
    (
        "bias",
        {"bias": zeros(1, K)},
        ValueError,
        r"expected shape \(5,\), one value per class, got \(1, 5\); pass bias\[0\]",
    ),
    (
        "bias",
        {"bias": zeros(D)},
        ValueError,
        r"expected shape \(5,\), one value .* class, got \(2,\)",
    ),
    ("logit_scale", {"logit_scale": NAN}, ValueError, f"{FINITE}, got nan"),
    ("logit_scale", {"logit_scale": np.asarray(INF)}, ValueError, f"{FINITE}, got inf"),
    ("logit_scale", {"logit_scale": INF}, ValueError, f"{FINITE}, got inf"),
    ("logit_scale", {"logit_scale": None}, TypeError, f"{FINITE}{OR_ARRAY}None"),
    (
        "logit_scale",
        {"logit_scale": zeros(N - 1)},
        ValueError,
        r"expected shape \(6,\), one value per row, or a scalar, got \(5,\)",
    ),
    (
        "logit_scale",
        {"logit_scale": zeros(N, 1)},
        ValueError,
        r"expected shape \(6,\), .*, got \(6, 1\); pass logit_scale\[..., 0\]",
    ),
    ("logit_scale", {"logit_scale": [1] * N}, TypeError, CAST.format("int32")),
    ("logit_scale", {"logit_scale": [[1.0], []]}, TypeError, rf"{ARRAY}\[\[1.0\], \[\]\]"),
    ("softcap", {"softcap": 0}, ValueError, f"{ABOVE_0}, got 0"),
    ("softcap", {"softcap": 0.0}, ValueError, f"{ABOVE_0}, got 0.0"),
    ("softcap", {"softcap": np.asarray(-30.0)}, ValueError, f"{ABOVE_0}, got -30.0"),
    ("softcap", {"softcap": -30.0}, ValueError, f"{ABOVE_0}, got -30.0"),
    ("softcap", {"softcap": NAN}, ValueError, f"{ABOVE_0}, got nan"),
    ("softcap", {"softcap": False}, TypeError, f"{ABOVE_0}{OR_ARRAY}False"),
    ("softcap", {"softcap": "30"}, TypeError, f"{ABOVE_0}{OR_ARRAY}'30'"),
    (
        "softcap",
        {"softcap": zeros(1)},
        ValueError,
        r"expected a scalar, got shape \(1,\); pass softcap\[0\]",
    ),
    (
        "logit_scale",
        {"logit_scale": jnp.ones(1)},
        ValueError,
        r"expected shape \(6,\), one value per row, or a scalar, got \(1,\); pass logit_scale\[0\]",
    ),
    ("chunk_size", {"chunk_size": 0}, ValueError, "expected at least 1, or None .*, got 0"),
    ("chunk_size", {"chunk_size": -1}, ValueError, "expected at least 1, or None .*, got -1"),
    ("chunk_size", {"chunk_size": 512.0}, TypeError, "expected an int or None, got 512.0"),
    ("chunk_size", {"chunk_size": True}, TypeError, "expected an int or None, got True"),
    (
        "where",
        {"where": zeros(N, K, dtype=bool)},
        ValueError,
        rf"expected .* \(6,\) \(rows\), got \(6, 5\); {OUT_OF_ALL}",
    ),
    (
        "where",
        {"where": zeros(K, dtype=bool)},
        ValueError,
        rf"expected .* \(6,\) \(rows\), got \(5,\); {OUT_OF_ALL}",
    ),
    (
        "where",
        {"where": zeros(K, dtype=bool), "softcap": jnp.array(30.0)},
        ValueError,
        rf"expected .* \(6,\) \(rows\), got \(5,\); {OUT_OF_ALL}",
    ),
    (
        "class_mask",
        {"class_mask": zeros(N, K, dtype=bool)},
        ValueError,
        r"expected shape \(5,\), one value per class, got \(6, 5\); to mask classes in some "
        "rows only, pass logits to sxe.softmax_cross_entropy, with where",
    ),
    # The advice does not mention axis, which the head does not have:
    ("labels", {"labels": zeros(K, dtype=int)}, ValueError, rf"{INDICES}, got \(5,\) of int32"),
]


@named([*SHARED, *RULES, *OF_HEAD])
def test_head(argument, given, error, message):
    arguments = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS} | given
    with says(argument, error, message):
        sxe.linear_softmax_cross_entropy(**arguments)
    with says(argument, error, message):
        jax.eval_shape(lambda: sxe.linear_softmax_cross_entropy(**arguments))


# Arrays of another shape for rows [B, T]. The tests follow the advice of the error.

B, T = 3, 4
LOSSES = [sxe.softmax_cross_entropy, sxe.softmax_cross_entropy_with_gradient]
LOSSES.append(sxe.linear_softmax_cross_entropy)


def call(loss, rows=(B, T), **given):
    head = loss is sxe.linear_softmax_cross_entropy
    arguments = {"hidden": zeros(*rows, D), "kernel": KERNEL} if head else {}
    arguments |= {} if head else {"logits": zeros(*rows, K)}
    return loss(**(arguments | {"labels": zeros(*rows, dtype=int)} | given))


PASS = "; sxe does not broadcast it: pass "
OTHER_SHAPES = [
    ((B, T), (B, T, 1), "; pass {}[..., 0]"),
    ((B, T), (1, B, T), "; pass {}[0]"),
    ((B, T), (T, B), "; pass {}.T"),
    ((B, T), (B * T,), "; pass {}.reshape((3, 4))"),
    ((B * T,), (B, T), "; pass {}.reshape((12,))"),
    ((B, T), (B,), PASS + "jnp.broadcast_to({}[:, None], (3, 4))"),
    ((B, T), (B, 1), PASS + "jnp.broadcast_to({}, (3, 4))"),
    ((B, T), (T,), PASS + "jnp.broadcast_to({}, (3, 4))"),
    ((B, T), (1, T), PASS + "jnp.broadcast_to({}, (3, 4))"),
    ((B, T), (), PASS + "jnp.broadcast_to({}, (3, 4))"),
    ((2, 3, 4), (2,), PASS + "jnp.broadcast_to({}[:, None, None], (2, 3, 4))"),
    ((2, 3, 4), (3,), PASS + "jnp.broadcast_to({}[:, None], (2, 3, 4))"),
    ((2, 3, 4), (2, 3), PASS + "jnp.broadcast_to({}[:, :, None], (2, 3, 4))"),
    (
        (T, T),  # one value per row or per column
        (T,),
        PASS + "jnp.broadcast_to({0}, (4, 4)) or jnp.broadcast_to({0}[:, None], (4, 4))",
    ),
    ((B, T), (2,), ""),
    ((B, T), (T, B, 1), ""),
]


@pytest.mark.parametrize("argument", ["where", "weights", "labels"])
@pytest.mark.parametrize(("rows", "shape", "advice"), OTHER_SHAPES, ids=str)
def test_rows_of_another_shape(rows, shape, advice, argument):
    dtype = {"where": bool, "weights": np.float32, "labels": int}[argument]
    given, advice = zeros(*shape, dtype=dtype), advice.format(argument)
    got = r"got \(.*\)( of int32)?" + re.escape(advice)
    for loss in LOSSES:
        with says(argument, ValueError, f"expected .*, {got}"):
            call(loss, rows, **{argument: given})
        for way in re.findall(r"(?:pass|or) ([a-z].*?)(?= or |$)", advice):
            fitting = eval(way, {"jnp": jnp, argument: given})
            jax.eval_shape(lambda loss=loss, x=fitting: call(loss, rows, **{argument: x}))


@pytest.mark.parametrize(
    ("logits", "axis", "shape", "advice"),
    [
        ((B, T, K), -1, (K,), "jnp.broadcast_to(where, (3, 4, 5))"),
        ((B, T, K), -1, (B, 1, K), "jnp.broadcast_to(where, (3, 4, 5))"),
        ((B, K, T), 1, (K,), "jnp.broadcast_to(where[:, None], (3, 5, 4))"),
        # The mask may be one of rows or of classes:
        (
            (B, K, K),
            -1,
            (K,),
            "jnp.broadcast_to(where, (3, 5)) or jnp.broadcast_to(where, (3, 5, 5))",
        ),
    ],
    ids=str,
)
def test_a_class_mask_of_another_shape(logits, axis, shape, advice):
    rows = tuple(n for i, n in enumerate(logits) if i != axis % 3)
    arguments = {"logits": zeros(*logits), "labels": zeros(*rows, dtype=int), "axis": axis}
    where = np.ones(shape, bool)
    message = re.escape(f"{rows} (rows) or {logits} (classes), got {shape}{PASS}{advice}")
    for loss in LOSSES[:2]:
        with says("where", ValueError, f"expected a mask of shape {message}"):
            loss(**arguments, where=where)
        for way in advice.split(" or "):
            fitting = eval(way, {"jnp": jnp, "where": where})
            jax.eval_shape(lambda loss=loss, x=fitting: loss(**arguments, where=x))


def test_one_class_and_a_mask_of_its_shape():
    """With one class, [B, T, 1] is the shape of the logits, and the mask is one of classes."""
    logits, labels = zeros(B, T, 1), zeros(B, T, dtype=int)
    where = np.arange(B * T).reshape(B, T, 1) < 5
    _, metrics = sxe.softmax_cross_entropy(logits, labels, where=where, return_metrics=True)
    assert metrics.weight_sum == 5


def test_labels_of_a_language_model_that_are_shifted_otherwise():
    for loss, name in zip(LOSSES, ("logits", "logits", "hidden"), strict=True):
        for length, advice in (
            (8, f"if the labels are the next tokens, pass {name}[..., :-1, :]"),
            (10, "if the labels are all tokens, pass the next tokens, labels[..., 1:]"),
        ):
            with says("labels", ValueError, f"expected .* of int32; {re.escape(advice)}"):
                call(loss, (B, 9), labels=zeros(B, length, dtype=int))


# Objects that contain arrays, but are not arrays.


class Quantity:
    value = KERNEL


class Layer:
    def __init__(self, name):
        setattr(self, name, KERNEL)


@pytest.mark.parametrize("held", ["kernel", "embedding.T", "weight.T"])
def test_a_layer(held):
    layer = Layer(held.removesuffix(".T"))
    with says("kernel", TypeError, f"{ARRAY}an object of type Layer; pass its .{held}"):
        sxe.linear_softmax_cross_entropy(HIDDEN, layer, LABELS)


def test_boxes():
    from flax import linen

    boxes = [(Quantity(), "pass its .value")]
    for box in (linen.Partitioned, linen.LogicallyPartitioned):
        boxes.append((box(KERNEL, ("a", "b")), r"unbox it with nn.meta.unbox\(params\) of Flax"))
    for box, advice in boxes:
        for name in ("hidden", "kernel", "labels", "bias", "where", "weights", "class_weights"):
            arguments = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS} | {name: box}
            with says(name, TypeError, f"{ARRAY}an object of type .*; {advice}"):
                sxe.linear_softmax_cross_entropy(**arguments)
        for name in ("label_smoothing", "z_loss", "logit_scale", "softcap"):
            with pytest.raises(TypeError, match=rf"(?s)\A{name}: expected .*; {advice}\Z"):
                sxe.linear_softmax_cross_entropy(HIDDEN, KERNEL, LABELS, **{name: box})
        for loss in LOSSES[:2]:
            with says("logits", TypeError, f"{ARRAY}an object of type .*; {advice}"):
                loss(box, LABELS)


def test_a_reference():
    with says("logits", TypeError, rf"{ARRAY}an object of type Ref; read it with ref\[...\]"):
        sxe.softmax_cross_entropy(jax.new_ref(jnp.asarray(LOGITS)), LABELS)


# Under transformations.


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("axis", -1, f"expected an int or .*, {TRACED.format('axis')}"),
        ("ignore_index", -1, f"expected an int or None, {TRACED.format('ignore_index')}"),
        ("return_metrics", True, f"expected True or False, {TRACED.format('return_metrics')}"),
        ("label_smoothing", 0, f"{NUMBER}{OR_ARRAY}.*Tracer.*; cast it to a float dtype"),
    ],
)
def test_a_static_option_that_is_traced(argument, value, message):
    """For example, jax.jit(sxe.softmax_cross_entropy)(logits, labels, axis=-1)."""
    with says(argument, TypeError, message):
        jax.jit(sxe.softmax_cross_entropy)(LOGITS, LABELS, **{argument: value})


def test_a_chunk_size_that_is_traced():
    message = f"expected an int or None, {TRACED.format('chunk_size')}"
    with says("chunk_size", TypeError, message):
        jax.jit(sxe.linear_softmax_cross_entropy)(HIDDEN, KERNEL, LABELS, chunk_size=2)


# On a mesh: 8 rows, D = 4 and 16 classes, over 2 x 4 devices.

WIDE = {"logits": zeros(8, 16), "labels": zeros(8, dtype=int)}
WIDE_HEAD = {"hidden": zeros(8, 4), "kernel": zeros(4, 16), "labels": zeros(8, dtype=int)}
HEAD = sxe.linear_softmax_cross_entropy


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def within_shard_map(loss, arrays, specs, **options):
    f = jax.shard_map(
        lambda arrays: loss(**arrays, **options),
        mesh=make_mesh(),
        in_specs=({name: specs.get(name, P()) for name in arrays},),
        out_specs=P(),
    )
    return jax.eval_shape(f, arrays)


BOTH = {"axis_name": "model", "batch_axis_name": "data"}
SPLIT = {"logits": P("data", "model"), "labels": P("data")}
SAME = "over which .* replicated .*; shard it in in_specs, or omit the axis"
ONE_DEVICE = "; inside jax.shard_map, shapes are those of one device: check its in_specs"


@pytest.mark.parametrize(
    ("argument", "given", "specs", "options", "message"),
    [
        ("axis_name", {}, {}, {"axis_name": "x"}, OUTSIDE),
        ("axis_name", {}, {"logits": P("data")}, BOTH, f"expected .* 'model', {SAME}"),
        (
            "batch_axis_name",
            {},
            {"logits": P(None, "model"), "labels": P()},
            BOTH,
            f"expected .*'data', {SAME}",
        ),
        ("labels", {}, {"labels": P()}, BOTH, rf"expected .*, got \(8,\) of int32{ONE_DEVICE}"),
        (
            "labels",
            {"labels": zeros(8, 16)},
            {},
            BOTH,
            rf"expected .* \(4, 4\) .*, got \(4, 16\) of float32{ONE_DEVICE}",
        ),
        ("where", {"where": zeros(8, dtype=bool)}, {}, BOTH, rf"expected .*\(8,\){ONE_DEVICE}"),
        ("weights", {"weights": zeros(8)}, {}, BOTH, rf"expected .*, got \(8,\){ONE_DEVICE}"),
        ("weights", {"weights": zeros(1)}, {}, BOTH, rf"expected .*, got \(1,\){ONE_DEVICE}"),
        (
            "weights",
            {"weights": zeros(4, 1)},
            {},
            BOTH,
            r"expected .*, got \(4, 1\); pass weights\[..., 0\]",
        ),
        (
            "class_weights",
            {"class_weights": zeros(16)},
            {},
            BOTH,
            rf"expected shape \(4,\), one value per class, got \(16,\){ONE_DEVICE}",
        ),
    ],
)
def test_within_shard_map(argument, given, specs, options, message):
    for loss in (sxe.softmax_cross_entropy, sxe.softmax_cross_entropy_with_gradient):
        with says(argument, ValueError, message):
            within_shard_map(loss, WIDE | given, SPLIT | specs, **options)


@pytest.mark.parametrize(
    ("argument", "specs", "message"),
    [
        ("axis_name", {}, f"expected .* shards the kernel, got 'model', {SAME}"),
        ("batch_axis_name", {"hidden": P()}, f"expected .* hidden states, got 'data', {SAME}"),
    ],
)
def test_head_within_shard_map(argument, specs, message):
    specs = {"hidden": P("data"), "labels": specs.get("hidden", P("data"))} | specs
    if argument == "batch_axis_name":
        specs["kernel"] = P(None, "model")
    with says(argument, ValueError, message):
        within_shard_map(HEAD, WIDE_HEAD, specs, **BOTH)


@named(
    [
        ("loss", {"loss": jnp.mean}, TypeError, r"expected one of sxe\.softmax_.*, got .*mean.*"),
        (
            "loss",
            {"loss": jax.jit(HEAD)},
            TypeError,
            "expected .*; pass options, and apply jax.jit, to .*",
        ),
        ("mesh", {"mesh": (2, 4)}, TypeError, r"expected a jax.sharding.Mesh .*, got \(2, 4\)"),
        ("batch", {"batch": 0}, TypeError, f"{MESH_AXIS}0"),
        ("batch", {"batch": "x"}, ValueError, r"expected axes .*\('data', 'model'\), got 'x'"),
        ("batch", {"batch": ("data", "data")}, ValueError, r"expected .* once, got .*'data'\)"),
        ("batch", {"batch": P("data", "data")}, ValueError, "expected .* once, got 'data' again"),
        (
            "classes",
            {"batch": "model", "classes": "model"},
            ValueError,
            "expected mesh axes named once, got 'model' again",
        ),
        (
            "fsdp",
            {"batch": "data", "fsdp": "model"},
            ValueError,
            r"expected axes of batch, \('data',\), got 'model'",
        ),
        (
            "fsdp",
            {"loss": sxe.softmax_cross_entropy, "fsdp": "data"},
            ValueError,
            "expected None for softmax_cross_entropy, which has no kernel, got 'data'",
        ),
    ]
)
def test_over_mesh(argument, given, error, message):
    with says(argument, error, message):
        sxe.over_mesh(**{"loss": HEAD, "mesh": make_mesh(), **given})


PADDING = "pad the classes, and mask them with class_mask"
MULTIPLE = "expected a size along axis {} that is a multiple of {}, .*, got shape {}; {}"


@named(
    [
        (
            "hidden",
            {"hidden": zeros(7, 4), "labels": zeros(7, dtype=int)},
            ValueError,
            MULTIPLE.format(0, 2, r"\(7, 4\)", "pad the rows, and mask them with where"),
        ),
        (
            "kernel",
            {"kernel": zeros(4, 15)},
            ValueError,
            MULTIPLE.format(1, 4, r"\(4, 15\)", PADDING),
        ),
        (
            "kernel",
            {"hidden": zeros(8, 3), "kernel": zeros(3, 16)},
            ValueError,
            MULTIPLE.format(0, 2, r"\(3, 16\)", "shard it over other mesh axes, or over none"),
        ),
        (
            "batch",
            {"batch": P("data", "model"), "classes": None, "fsdp": None},
            ValueError,
            r"expected entries for at most 1 axes, those of the rows, got P.*; pass .* as classes",
        ),
        (
            "axis_name",
            {"axis_name": "model"},
            TypeError,
            "expected to be left out, because batch and classes of over_mesh name .*, got 'model'",
        ),
        # The shapes are global:
        ("labels", {"labels": zeros(4, dtype=int)}, ValueError, r"expected .*\(8,\).*\(4,\) .*"),
        ("bias", {"bias": zeros(4)}, ValueError, r"expected shape \(16,\), .*, got \(4,\)"),
        (
            "weights",
            {"weights": zeros(8, 1)},
            ValueError,
            r"expected shape \(8,\), .*, got \(8, 1\); pass weights\[..., 0\]",
        ),
    ]
)
def test_a_call_over_mesh(argument, given, error, message):
    layout = {"batch": "data", "classes": "model", "fsdp": "data"}
    layout |= {name: given[name] for name in layout if name in given}
    arguments = WIDE_HEAD | {name: x for name, x in given.items() if name not in layout}
    with says(argument, error, message):
        sxe.over_mesh(HEAD, make_mesh(), **layout)(**arguments)


def test_over_mesh_within_shard_map():
    over = sxe.over_mesh(HEAD, make_mesh(), batch="data")
    message = r"expected Auto or Explicit .*, got \['data'\], which are Manual; .*axis_name.*"
    with says("batch", ValueError, message):
        within_shard_map(over, WIDE_HEAD, {"hidden": P("data"), "labels": P("data")})


@pytest.mark.parametrize(
    ("argument", "hidden", "kernel", "message"),
    [
        (
            "hidden",
            P(None, "model"),
            P(),
            "expected a last axis that is not sharded, .*@model.*; use jax.reshard",
        ),
        (
            "kernel",
            P("model"),
            P(None, "model"),
            "expected classes .*'model'.*; jax.reshard one .*",
        ),
    ],
)
def test_head_on_an_explicit_mesh(argument, hidden, kernel, message):
    mesh = make_mesh(AxisType.Explicit)
    specs = {"hidden": hidden, "kernel": kernel, "labels": P()}
    arrays = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in WIDE_HEAD.items()
    }
    with says(argument, ValueError, message):
        HEAD(**arrays)


OTHERWISE = [
    ("weights", {"weights": P("model")}, None, r"P\('data',\)"),
    ("where", {"where": P(("data", "model"))}, None, r"P\('data',\)"),
    ("labels", {"labels": P("model")}, None, r"P\('data',\)"),
    ("class_weights", {"class_weights": P("data")}, None, r"P\('model',\)"),
    ("class_mask", {"class_mask": P("data")}, None, r"P\('model',\)"),
    # If the rows are not sharded, another argument may shard them, but not as the classes are:
    ("labels", {"rows": None, "labels": P("model")}, None, r"P\(None,\)"),
    (
        "weights",
        {"rows": None, "classes": None, "labels": P("data"), "weights": P("model")},
        "labels",
        r"P\('data',\)",
    ),
]


@pytest.mark.parametrize("head", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize(
    ("argument", "specs", "of", "spec"), OTHERWISE, ids=[str(given) for _, given, *_ in OTHERWISE]
)
def test_arrays_that_an_explicit_mesh_splits_otherwise(argument, specs, of, spec, head):
    mesh = make_mesh(AxisType.Explicit)
    specs = {"rows": "data", "classes": "model"} | specs
    rows, classes = specs["rows"], specs["classes"]
    specs |= {"logits": P(rows, classes), "hidden": P(rows), "kernel": P(None, classes)}
    arrays = (WIDE_HEAD if head else WIDE) | {
        "where": zeros(8, dtype=bool),
        "weights": zeros(8),
        "class_weights": zeros(16),
        "class_mask": zeros(16, dtype=bool),
    }
    arrays = {
        name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P())))
        for name, x in arrays.items()
    }
    of = of or ("hidden and kernel" if head else "logits")
    got = r"got P\(.*\) \(.*@.*\)"
    message = (
        f"expected .* as {of}, {spec}, or unsharded, {got}; use jax.reshard.{argument}, {spec}."
    )
    with jax.set_mesh(mesh), says(argument, ValueError, message):
        (HEAD if head else sxe.softmax_cross_entropy)(**arrays)


def test_logits_of_an_explicit_mesh_without_it():
    sharding = NamedSharding(make_mesh(AxisType.Explicit), P("data"))
    message = r"expected a call in .* Explicit mesh .*, got no mesh; use jax.set_mesh\(mesh\)"
    with says("logits", ValueError, message):
        sxe.softmax_cross_entropy(**jax.device_put(WIDE, sharding))


# The plan.

OF_DEVICES = {"mesh": {"data": 2, "model": 2}} | BOTH
SIDES = r"\('hidden', 'kernel', 'target_hidden', 'target_kernel'\)"
NAMES = rf"expected a sequence of names among {SIDES}, got "


@named(
    [
        ("rows", {"rows": -1}, ValueError, "expected at least 0, got -1"),
        ("hidden", {"hidden": 2.0}, TypeError, "expected an int, got 2.0"),
        ("rows", {"rows": True}, TypeError, "expected an int, got True"),
        ("classes", {"classes": np.zeros(2, int)}, TypeError, r"expected an int, got array\(.*\)"),
        ("classes", {"classes": 0}, ValueError, "expected at least 1, got 0"),
        ("dtype", {"dtype": "int32"}, TypeError, f"{DTYPE}int32"),
        ("dtype", {"dtype": "bf16"}, TypeError, f"{DTYPE}bf16"),
        ("dtype", {"dtype": None}, TypeError, f"{DTYPE}None"),
        ("reduction", {"reduction": "max"}, ValueError, "expected one of .*, got 'max'"),
        ("rule", {"rule": "grad"}, ValueError, f"{ONE_OF}'grad'"),
        ("differentiate", {"differentiate": "hidden"}, TypeError, f"{NAMES}'hidden'"),
        ("differentiate", {"differentiate": None}, TypeError, f"{NAMES}None"),
        ("differentiate", {"differentiate": iter(["hidden"])}, TypeError, f"{NAMES}<.*iterator.*>"),
        ("differentiate", {"differentiate": ["bias"]}, ValueError, "expected one of .* got 'bias'"),
        ("options", {"options": ["z_loss"]}, ValueError, "expected one of 'where', .*'z_loss'"),
        ("chunk_size", {"chunk_size": 0}, ValueError, "expected at least 1, .*, got 0"),
        ("backend", {"backend": "cuda"}, ValueError, "expected .* 'gpu', 'tpu', got 'cuda'"),
        (
            "mesh",
            {"mesh": (2, 4)},
            TypeError,
            r"expected .*{'data': .*, got \(2, 4\); .*mesh.shape",
        ),
        ("mesh", {"mesh": {"data": 0}}, ValueError, "expected an int .* 1 for 'data', got 0"),
        ("mesh", {"mesh": {"data": 2.0}}, TypeError, "expected an int .* for 'data', got 2.0"),
        ("axis_name", {"axis_name": "x"}, ValueError, "expected .* 'x'; pass mesh={'x': ...}"),
        ("axis_name", {"axis_name": 2}, TypeError, f"{MESH_AXIS}2"),
        (
            "axis_name",
            {"mesh": {"data": 2}, "axis_name": "x"},
            ValueError,
            r"expected axes of mesh, \('data',\), got 'x'",
        ),
        (
            "batch_axis_name",
            {"mesh": {"data": 2}, "axis_name": "data", "batch_axis_name": "data"},
            ValueError,
            "expected axes named once, got 'data' again",
        ),
        (
            "fsdp",
            OF_DEVICES | {"fsdp": "model"},
            ValueError,
            "expected axes of batch_axis_name, got 'model'",
        ),
        ("rule", OF_DEVICES | {"rule": "jvp"}, ValueError, "expected 'vjp' with a mesh, got 'jvp'"),
        (
            "rows",
            OF_DEVICES | {"rows": 7},
            ValueError,
            r"expected a multiple of 2, the devices along \('data',\), got 7",
        ),
        ("classes", OF_DEVICES | {"classes": 7}, ValueError, r"expected .*\('model',\), got 7"),
        (
            "hidden",
            OF_DEVICES | {"hidden": 3, "fsdp": "data"},
            ValueError,
            r"expected a multiple of 2, the devices along \('data',\), got 3",
        ),
        (
            "axis_name",
            {"mesh": {"data": 2}, "memory_bytes": 1e9},
            ValueError,
            "expected one axis of mesh, because memory_bytes divides .* classes, got None",
        ),
        (
            "memory_bytes",
            OF_DEVICES | {"memory_bytes": "8GB"},
            TypeError,
            "expected a number or None, got '8GB'",
        ),
        (
            "memory_bytes",
            OF_DEVICES | {"memory_bytes": 10},
            ValueError,
            "expected at least [0-9]+ for the head on 4 devices, got 10",
        ),
        (
            "mesh",
            OF_DEVICES | {"rows": 7, "classes": 13, "memory_bytes": 1e9},
            ValueError,
            "expected 4 devices that can divide 7 rows and 13 classes, got .*expected a multiple.*",
        ),
        ("target_hidden", {"target_hidden": 0}, ValueError, "expected at least 1, got 0"),
        ("target_hidden", {"target_hidden": 2.0}, TypeError, "expected an int, got 2.0"),
        (
            "differentiate",
            {"differentiate": ("target_kernel",)},
            ValueError,
            "expected 'target_kernel' only for a divergence; pass target_hidden, the target's "
            "hidden size, as well",
        ),
        (
            "options",
            {"options": ("jensen_shannon",)},
            ValueError,
            "expected 'jensen_shannon' only for a divergence; pass target_hidden, .*",
        ),
        (
            "options",
            {"options": ("label_smoothing",), "target_hidden": 4},
            ValueError,
            "expected no 'label_smoothing' with target_hidden: a divergence has no labels",
        ),
        (
            "target_hidden",
            OF_DEVICES | {"target_hidden": 3, "fsdp": "data"},
            ValueError,
            r"expected a multiple of 2, the devices along \('data',\), got 3",
        ),
    ]
)
def test_plan(argument, given, error, message):
    with says(argument, error, message) as raised:
        sxe.plan(**{"rows": 8, "hidden": 4, "classes": 16, **given})
    for an_error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert isinstance(an_error, error)
        assert an_error.argument == argument
        assert str(an_error) == an_error.args[0] == f"{argument}: {an_error.message}"


@pytest.mark.parametrize("argument", ["flops", "bytes", "link_bytes"])
def test_rates_of_a_plan(argument):
    rates = {f"{name}_per_second": 1.0 for name in ("flops", "bytes", "link_bytes")}
    argument += "_per_second"
    with says(argument, ValueError, "expected a number above 0, got 0"):
        sxe.plan(8, 4, 16).floor(**(rates | {argument: 0}))


# The derivation.


@pytest.mark.parametrize("line", sxe.derivation.LINES, ids=lambda line: line.name)
def test_lines_of_the_derivation(line):
    message = r"expected targets .*\(6, 5\), got {}; for labels \[N\] pass jax.nn.one_hot\(y, 5\)"
    for y in (LABELS, zeros(K), zeros(1, K), zeros(N, 1)):
        with says("y", ValueError, message.format(re.escape(str(y.shape)))):
            line.closed_form(LOGITS, y)
    with says("x", ValueError, r"expected logits \[N, K\], got shape \(5,\)"):
        line.closed_form(LOGITS[0], LOGITS[0])


@pytest.mark.parametrize("line", sxe.derivation.ROW_LINES, ids=lambda line: line.name)
def test_lines_of_entropy_and_divergences(line):
    others = [LOGITS] * ("z" in line.takes)
    with says("x", ValueError, r"expected logits \[N, K\], got shape \(5,\)"):
        line.closed_form(LOGITS[0], *others)
    message = r"expected target logits \[N, K\] with the logits' shape, \(6, 5\), got {}"
    for z in (zeros(K), zeros(1, K), zeros(N, 1)) if others else ():
        with says("z", ValueError, message.format(re.escape(str(z.shape)))):
            line.closed_form(LOGITS, z)
    if "beta" in line.takes:
        with says("beta", ValueError, r"expected one number, got shape \(6,\)"):
            line.closed_form(LOGITS, LOGITS, beta=zeros(N))


# The command line.

PLAN = ["plan", "--rows", "8", "--hidden", "4", "--classes", "16"]
BENCH = ["bench", "--rows", "8", "--classes", "9"]
MESH = [*PLAN, "--mesh", "data=2,model=2"]


@pytest.mark.parametrize(
    ("arguments", "argument", "message"),
    [
        ([*PLAN, "--rows", "1e6"], "--rows", "expected an integer of at least 1, got '1e6'"),
        ([*PLAN, "--chunk-size", "0"], "--chunk-size", "expected an integer .*, got '0'"),
        ([*PLAN, "--dtype", "fp32"], "--dtype", "invalid choice: 'fp32' .*float32.*"),
        ([*PLAN, "--mesh", "2x4"], "--mesh", "expected axes such as data=64,model=8, got '2x4'"),
        ([*PLAN, "--mesh", "data=2,data=4"], "--mesh", "expected axes such as data=64,model=8, .*"),
        ([*PLAN, "--mesh", "data=0"], "--mesh", "expected an int of at least 1 for 'data', got 0"),
        ([*PLAN, "--mesh", "data=2,tensor=2"], "--mesh", "expected axes that .*, got 'tensor'; .*"),
        ([*PLAN, "--mesh", "data=3"], "--rows", r"expected a multiple of 3, .*\('data',\), got 8"),
        ([*MESH, "--axis-name", "a,a"], "--axis-name", r"expected .* once, got \('a', 'a'\)"),
        ([*PLAN, "--memory", "1e9"], "--axis-name", "expected one axis of mesh, .*, got None"),
        ([*MESH, "--memory", "8GB"], "--memory", "expected a number above 0, got '8GB'"),
        ([*MESH, "--memory", "-1"], "--memory", "expected a number above 0, got '-1'"),
        ([*MESH, "--memory", "10"], "--memory", "expected at least [0-9]+ .*, got 10"),
        (
            [*PLAN, "--flops-per-second", "1e12", "--link-bytes-per-second", "1e9"],
            "--bytes-per-second",
            "expected too: the bound of the time needs all three rates",
        ),
        ([*PLAN, "--bytes-per-second", "0"], "--bytes-per-second", "expected .* 0, got '0'"),
        (["bench", "--rows", "8"], "--classes", "expected with --rows or --hidden"),
        (["bench", "--budget", "60"], "--budget", "expected with --suite"),
        ([*BENCH, "--chunk-size", "4"], "--chunk-size", "expected with --hidden or --suite"),
        (
            ["bench", "--suite", "--calls"],
            "--calls",
            "expected without --suite, which has its own problems",
        ),
        (["bench", "--hidden", "8"], "--rows", "expected with --classes or --hidden"),
        (["bench", "--dense"], "--dense", "expected with --rows and --classes"),
        ([*BENCH, "--hidden", "3", "--dense"], "--dense", "expected logits, without --hidden"),
        ([*BENCH, "--confident", "2"], "--confident", r"expected a share in \[0, 1\], got 2.0"),
        ([*BENCH, "--seconds", "-1"], "--seconds", "expected a number above 0, got '-1'"),
        ([*BENCH, "--peers", "nobody"], "--peers", "expected names among .*optax.*; got nobody"),
        ([*BENCH, "--plot", "x.png"], "--plot", "expected one of --rows, --hidden and .*"),
        ([*BENCH, "16", "--plot", "x.foo"], "--plot", "expected .* in .png, .*, got x.foo"),
        (
            [*BENCH, "--json", "no/x.json"],
            "--json",
            "expected a file in .* exists, got 'no/x.json'",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_command_line(arguments, argument, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2
    text = capsys.readouterr().err
    assert re.search(rf"^python -m sxe \w+: error: (argument )?{argument}: {message}$", text, re.M)


@pytest.mark.parametrize(
    ("missing", "arguments"), [("tqdm", BENCH), ("matplotlib", [*BENCH, "16", "--plot", "x.png"])]
)
def test_an_extra_that_is_missing(missing, arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    text = capsys.readouterr().err
    assert re.search(rf"error: needs {missing}[.\w]*: pip install 'sxe\[bench\]'$", text, re.M)
