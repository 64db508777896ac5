"""From labels and options to targets for each class, and to the rows that count."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from sxe._arrays import (
    AxisName,
    any_class,
    is_dense,
    keep,
    psum,
    reshard,
    sharding,
    vary_like,
    wide_dtype,
)
from sxe._backend import Backend
from sxe._call.axes import classes_last, is_mapped_split
from sxe._call.label_check import checked
from sxe._call.options import Options
from sxe._rows.targets import Dense, Rows, Sparse, Targets, is_label
from sxe._rows.twins import dense_targets


def _both(a: Array | None, b: Array) -> Array:
    return b if a is None else a & b


class _Classes(NamedTuple):
    """The classes on this device, among all classes.

    Attributes:
      number: the number of all classes.
      mask: bool, the classes on this device that can occur, or None if all can.
      possible: the number of all classes that can occur.
      first: the index of the first class on this device.
      axis_name: the mesh axes that shard the classes.
      backend: where the program runs.
    """

    number: int
    mask: Array | None
    possible: Array | int
    first: Array | int
    axis_name: AxisName
    backend: Backend


def _classes(at_hand: int, options: Options, dtype: DTypeLike, backend: Backend) -> _Classes:
    axis_name, mask = options.axis_name, options.class_mask
    number = at_hand
    first: Array | int = 0
    if axis_name is not None:
        number = at_hand * lax.axis_size(axis_name)
        first = lax.axis_index(axis_name) * at_hand
    possible = number if mask is None else psum(jnp.sum(mask, dtype=dtype), axis_name)
    return _Classes(number, mask, possible, first, axis_name, backend)


def make_rows(
    labels: Array,
    options: Options,
    backend: Backend,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    finite: Array | None,
    as_given: bool = False,
) -> Rows:
    """Apply all options about targets and rows, for logits of this shape [..., K] and dtype.

    If a mesh axis shards the classes, dense targets, class weights and class mask are the shards of
    this device. ``where`` has the shape of the rows: a ``where`` of classes has been applied to the
    logits before. Targets and weights are returned in float32, or in float64 for float64 logits.
    ``finite`` [...] says which rows have a loss if their label is valid; None means all rows. With
    ``as_given``, dense targets that no option changes keep their dtype and are not masked.
    """
    dtype = wide_dtype(dtype)
    classes = _classes(shape[-1], options, dtype, backend)
    smoothing, class_weights = options.label_smoothing, options.class_weights
    a = None if smoothing is None else jnp.asarray(smoothing, dtype)
    c = None if class_weights is None else class_weights.astype(dtype)
    dense, w = is_dense(labels), options.label_weights
    mask = options.where
    if classes.mask is not None:
        # Ignore the weights of classes that cannot occur. If no class can occur, no row counts.
        c = None if c is None else jnp.where(classes.mask, c, 1)
        mask = _both(mask, jnp.broadcast_to(classes.possible > 0, shape[:-1]))
    if dense:
        as_given = as_given and a is None and c is None
        labels = labels if as_given else labels.astype(dtype)
        good = _has_finite_sum(labels, dtype, options.axis_name)
    else:
        # Compare integers of at least 32 bits. Narrow integers cannot hold K, and narrow unsigned
        # integers no negative ignore_index.
        if jnp.iinfo(labels.dtype).bits < 32:
            labels = labels.astype(jnp.int32)
        ignored, info = options.ignore_index, jnp.iinfo(labels.dtype)
        if ignored is not None and info.min <= ignored <= info.max:
            mask = _both(mask, labels != np.array(ignored, labels.dtype))
        is_class = (labels >= 0) & (labels < classes.number)
        good = is_class
        if w is not None:
            w = w.astype(dtype)
            wrong = ~is_class & (w != 0)  # a label of weight 0 is padding
            good = (jnp.sum(wrong, axis=-1) == 0) & _has_finite_sum(w, dtype, None)

    weight, mask = weight_and_mask(options, mask, _both(finite, good), dtype)
    norm = weight
    if dense:
        labels = labels if as_given else keep(mask, labels)
        return Rows(_of_dense(labels, a, c, classes), weight, norm, mask)

    bad = ~good if mask is None else mask & ~good
    several = w is not None
    if w is None:
        w, wrong = jnp.ones_like(weight), bad
    else:
        w, wrong = keep(mask, jnp.where(is_class, w, 0)), bad[..., None] & wrong
    labels = checked(labels, wrong, classes.number, _advice(options))
    label = jnp.where(is_class, labels, -1).astype(jnp.int32)
    if c is not None:
        of_class = _weight_of(label, c, classes)
        w, norm = w * of_class, norm if several else norm * of_class
    targets = _of_labels(label, w, (a, c), classes, several=several)
    # NaN is computed as 0 / 0: a constant NaN would trip debug_nans even if no label is bad.
    total = jnp.where(bad, 0, targets.total) / jnp.where(bad, 0, jnp.ones_like(weight))
    return Rows(targets._replace(total=total), weight, norm, mask)


def weight_and_mask(
    options: Options, mask: Array | None, has_loss: Array, dtype: DTypeLike
) -> tuple[Array, Array | None]:
    """The weight of each row, [...], and the mask of the rows that count."""
    weight = jnp.ones(has_loss.shape, dtype)
    if options.weights is not None:
        weight = options.weights.astype(dtype)
        # Mask rows of weight 0 without a finite loss, so that no NaN leaks. A row of weight 0 that
        # has one is kept, because the loss is the derivative for its weight.
        mask = _both(mask, (weight != 0) | has_loss)
    return keep(mask, weight), mask


def masked_classes(
    logits: Array, options: Options, class_axes: tuple[int, ...]
) -> tuple[Options, Array | None]:
    """The options with a ``where`` of rows only, and a mask of the classes that can occur.

    The mask combines ``class_mask`` and a ``where`` of classes. It is bool [..., K], or [1, ..., K]
    if it is the same in all rows, or None.
    """
    class_mask, where = None, options.where
    if options.class_mask is not None:
        class_mask = options.class_mask.reshape((1,) * (logits.ndim - len(class_axes)) + (-1,))
    if where is not None and where.shape == logits.shape:
        class_mask = _both(class_mask, classes_last(where, class_axes))
        where = any_class(class_mask, options.axis_name)
    return options.replace(where=where), class_mask


def _advice(options: Options) -> str:
    """Advice for the error about a label that is not in [0, K)."""
    if options.label_weights is not None:
        return "; give padding labels a weight of 0"
    if options.ignore_index is not None:
        return ""
    return "; if this label marks rows that do not count, pass it as ignore_index"


def _has_finite_sum(targets: Array, dtype: DTypeLike, axis_name: AxisName) -> Array:
    total = jnp.sum(targets, axis=-1, dtype=dtype)
    return jnp.isfinite(psum(total, axis_name))


def _of_dense(p: Array, a: Array | None, c: Array | None, classes: _Classes) -> Targets:
    """t_k = c_k ((1 - a) p_k + a / K)."""
    t = p
    if a is not None:
        t, spread = (1 - a) * p, _spread(_share(a, classes), classes)
        t = t + (spread if spread.ndim == 0 else _on_class_axis(spread, p.ndim))
    t = t if c is None else t * _on_class_axis(c, t.ndim)
    dense = dense_targets(t, classes.axis_name, classes.backend)
    return Targets(None, None, dense, dense.largest + dense.rest)


def _of_labels(
    label: Array,
    label_weight: Array,
    smoothing_and_weights: tuple[Array | None, Array | None],
    classes: _Classes,
    *,
    several: bool,
) -> Targets:
    """t_k = c_k ((1 - a) sum_m w_m [k = y_m] + a / K). The second term is the same for all rows.

    ``label_weight`` is c_y w: [...] for one label per row, [..., M] for several labels.
    """
    a, c = smoothing_and_weights
    index, target, dense = label - classes.first, label_weight, None
    if a is not None:
        target, share = (1 - a) * label_weight, _share(a, classes)
        ndim = label.ndim + (not several)
        t = _on_class_axis(_spread(share, classes), ndim)
        if c is None:
            share = share.reshape((1,) * (ndim - 1))
            dense = Dense(t, share, share * (classes.possible - 1))
        else:
            t = t * _on_class_axis(c, t.ndim)
            dense = dense_targets(t, classes.axis_name, classes.backend)
    total = jnp.sum(target, axis=-1) if several else target
    if dense is not None:
        total = total + (dense.largest + dense.rest)
    if several:
        return Targets(None, None, dense, total, Sparse(index, target))
    return Targets(index, target, dense, total)


def _share(a: Array, classes: _Classes) -> Array:
    """a / K, where K is the number of classes that can occur."""
    if classes.mask is None:
        return a / classes.number
    return a / jnp.maximum(classes.possible, 1)


def _spread(share: Array, classes: _Classes) -> Array:
    """a / K as a scalar, or as [K] with 0 for the classes on this device that cannot occur."""
    if classes.mask is None:
        return share
    return jnp.where(classes.mask, vary_like(share, classes.mask), 0)


def _weight_of(label: Array, c: Array, classes: _Classes) -> Array:
    """The class weight of each label, [...]; 0 for a label that is not in [0, K)."""
    index = label - classes.first
    inside = (index >= 0) & (index < c.size)
    index = jnp.where(inside, index, 0)
    # On an Explicit mesh, gather from a replicated table, and shard the result like the labels. If
    # a vmap maps a sharded axis of the labels, no type can name this sharding: take a sum instead.
    c, split = reshard(c, (None,)), sharding(index)
    if is_mapped_split(index):
        c = _on_class_axis(c, index.ndim + 1)
        found = jnp.sum(jnp.where(is_label(index, c.shape[-1]), c, 0), axis=-1)
    else:
        found = c.at[index].get(out_sharding=PartitionSpec(*split) if any(split) else None)
    return psum(jnp.where(inside, found, 0), classes.axis_name)


def _on_class_axis(c: Array, ndim: int) -> Array:
    """Reshape a scalar to [1, ..., 1], or [K] to [1, ..., K]."""
    return c.reshape((1,) * (ndim - c.ndim) + c.shape)
