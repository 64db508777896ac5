"""Random arguments, by name, for a call of any function, and the gradients for all of them."""

import jax
import jax.numpy as jnp
import numpy as np

# Factors of a case that are not options. The tests that have them implement them.
NOT_OPTIONS = {"dense", "none", "bfloat16", "axis", "fsdp"}
# Factors that are another kind of value for an option
KINDS_OF = {"where_class": "where", "row_scale": "logit_scale"}


def normal(*shape, dtype="float32", seed=0):
    """Normal numbers, of both signs."""
    rng = np.random.default_rng([seed, *shape])
    return rng.normal(size=shape).astype(jnp.dtype(dtype))


def wide_dtype(dtype):
    """The dtype in which the losses compute."""
    return "float64" if dtype == "float64" else "float32"


def logits_problem(*options, dense=False, dtype="float32", shape=(8, 24), lead=(), seed=0):
    """Logits, labels and these options of sxe.softmax_cross_entropy, as NumPy arrays.

    ``shape`` is the shape of the logits, [..., K]. Every array has the axes ``lead`` in front of
    its own axes. ``ignore_index`` is a Python integer. Row 1 has weight 0.
    """
    *rows, classes = shape
    rng = np.random.default_rng([seed, *lead, *shape])
    logits = 3 * rng.normal(size=(*lead, *shape))
    return {
        "logits": logits.astype(jnp.dtype(dtype)),
        **_labels_and_options(rng, options, dense, dtype, lead, rows, classes),
    }


def head_problem(*options, dense=False, dtype="float32", shape=(8, 3, 16), lead=(), seed=0):
    """Hidden states, kernel, labels and these options of sxe.linear_softmax_cross_entropy.

    Like ``logits_problem``, with the sizes [..., D, K] of hidden states and kernel as the shape.
    """
    *rows, width, classes = shape
    rng = np.random.default_rng([seed, *lead, *shape])
    hidden = rng.normal(size=(*lead, *rows, width))
    kernel = rng.normal(size=(*lead, width, classes))
    return {
        "hidden": hidden.astype(jnp.dtype(dtype)),
        "kernel": kernel.astype(jnp.dtype(dtype)),
        **_labels_and_options(rng, options, dense, dtype, lead, rows, classes),
    }


def divergence_problem(*options, dtype="float32", shape=(8, 24), lead=(), seed=0):
    """Logits, target logits and these options of sxe.kl_divergence.

    Like ``logits_problem``. "target_logit_scale" is one number, "target_row_scale" one per row.
    """
    of_targets = {"target_logit_scale": "logit_scale", "target_row_scale": "row_scale"}
    p = logits_problem(
        *(name for name in options if name not in of_targets),
        dtype=dtype,
        shape=shape,
        lead=lead,
        seed=seed,
    )
    del p["labels"]
    named = [of_targets[name] for name in options if name in of_targets]
    other = logits_problem(*named, dtype=dtype, shape=shape, lead=lead, seed=seed + 100)
    p["target_logits"] = other["logits"]
    if named:
        p["target_logit_scale"] = other["logit_scale"]
    return p


def _labels_and_options(rng, options, dense, dtype, lead, rows, classes):
    wide = jnp.dtype(wide_dtype(dtype))

    def uniform(low, high, *shape):
        return np.asarray(rng.uniform(low, high, size=(*lead, *shape)), wide)

    labels = rng.integers(classes, size=(*lead, *rows)).astype(np.int32)
    count = int(np.prod(rows))
    weights = uniform(0.5, 2, count)
    weights[..., 1:2] = 0
    # One row in five does not count.
    counts = np.broadcast_to(np.arange(count) >= (count + 4) // 5, (*lead, count))
    counts = rng.permuted(counts, axis=-1)
    possible = np.random.default_rng([*lead, *rows, classes]).random((*lead, classes)) < 0.7
    possible[..., 0] = True
    if "class_mask" in options:
        # A label that cannot occur has an infinite loss, which would hide everything else.
        of_rows = possible.reshape(*lead, *(1 for _ in rows), classes)
        can_occur = np.take_along_axis(of_rows, labels[..., None], axis=-1)[..., 0]
        labels = np.where(can_occur, labels, 0)
    mask = rng.random((*lead, *rows, classes)) < 0.7
    if not dense:
        # For the same reason, labels can occur.
        np.put_along_axis(mask, labels[..., None], True, axis=-1)
    mask.reshape(*lead, count, classes)[..., -1, :] = False  # the last row has no class left
    if "label_smoothing" in options:
        # The smoothing's target for an impossible class costs infinity, too. Mask whole rows.
        mask[:] = mask.any(-1, keepdims=True)
    values = {
        "where": counts.reshape(*lead, *rows),
        "where_class": mask,
        "weights": weights.reshape(*lead, *rows),
        "class_weights": uniform(0.5, 2, classes),
        "class_mask": possible,
        "label_smoothing": uniform(0.1, 0.4),
        "z_loss": uniform(0.01, 0.1),
        "ignore_index": int(labels.flat[0]),
        "bias": np.asarray(rng.normal(size=(*lead, classes)), wide),
        "logit_scale": uniform(0.5, 2),
        "softcap": uniform(1, 3),
        "row_scale": uniform(0.5, 2, *rows),
    }
    if dense:
        labels = uniform(0.1, 1, *rows, classes).astype(jnp.dtype(dtype))
        if "where_class" in options:
            labels = np.where(mask, labels, 0)
        if "class_mask" in options:
            labels = np.where(of_rows, labels, 0)
    given = {KINDS_OF.get(n, n): values[n] for n in options if n not in NOT_OPTIONS}
    return {"labels": labels, **given}


def apart(p):
    """The arrays of p, and its Python numbers, which become part of the program."""
    numbers = {name: x for name, x in p.items() if isinstance(x, int | float)}
    return {name: x for name, x in p.items() if name not in numbers}, numbers


def floats(p):
    """The arguments that have a gradient."""
    return {n: x for n, x in p.items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)}


def at(p, i):
    """Example i of arguments or results that have a leading axis of examples."""
    return jax.tree.map(lambda a: a[i], p)


def cotangent(p, reduction="mean", seed=0):
    """A random cotangent of both signs: one number per row if the loss has one, else one number."""
    rows = (p["hidden"] if "hidden" in p else p["logits"]).shape[:-1]
    wide = wide_dtype(p["hidden" if "hidden" in p else "logits"].dtype)
    return normal(*(rows if reduction == "none" else ()), dtype=wide, seed=seed + 1)


def with_gradients(loss, by=None):
    """A function of p and g that returns loss(p), and the gradients of its product with g, by name.

    The gradients are for the arguments in ``by``; by default, for all that have a gradient.
    """

    def call(p, g):
        given = floats(p) if by is None else {name: p[name] for name in by if name in p}
        value, pull = jax.vjp(lambda q: loss(p | q), given)
        return value, *pull(g)

    return call
