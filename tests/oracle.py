"""The loss from line D0 of the derivation, in float64 NumPy and in 60-digit arithmetic.

Nothing here calls sxe, and nothing is arranged for speed. The gradient is line D7, which
``test_oracle.py`` holds against central differences of the loss.
"""

import contextlib

import mpmath
import numpy as np
from tolerances import CLOSENESS

DIGITS = 60


def assert_close(actual, expected, dtype=None, scale=None):
    """Fail unless actual is what is expected, within the closeness of its dtype.

    The closeness is relative to the largest expected entry, or to ``scale``; ``dtype`` names
    another one.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    tolerance = CLOSENESS[str(dtype or actual.dtype)]
    actual = actual.astype(np.float64)
    finite = np.abs(expected[np.isfinite(expected)])
    scale = scale or max(finite.max(initial=0.0), 1e-30)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


@contextlib.contextmanager
def naming(*what):
    """Say in an error's notes what it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(" ".join(map(str, what)))
        raise


def _rows_last(x, axis):
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    x = np.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


def rows(
    logits,
    labels,
    *,
    where=None,
    weights=None,
    class_weights=None,
    class_mask=None,
    label_smoothing=0.0,
    z_loss=0.0,
    ignore_index=None,
    axis=-1,
):
    """Logits x, targets t, whether each row counts, its weight and its share of the mean."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    dense = labels.shape == logits.shape
    x = _rows_last(logits.astype(np.float64), axis)
    *shape, k = x.shape
    possible = np.ones(k, bool) if class_mask is None else np.asarray(class_mask)
    x = np.where(possible, x, -np.inf)
    counts = np.full(shape, possible.any())
    if where is not None:
        where = np.asarray(where)
        if where.shape == logits.shape:
            mask = _rows_last(where, axis)
            x = np.where(mask, x, -np.inf)
            counts &= (mask & possible).any(-1)
        else:
            counts &= where
    if ignore_index is not None:
        counts &= labels.astype(np.int64) != ignore_index
    w = np.ones(shape) if weights is None else np.asarray(weights).astype(np.float64)
    c = np.ones(k) if class_weights is None else np.asarray(class_weights).astype(np.float64)
    c = np.where(possible, c, 1)
    counts &= w != 0
    norm = w.copy()
    if dense:
        t = _rows_last(labels.astype(np.float64), axis)
    else:
        t = np.zeros((*shape, k))
        for i in np.ndindex(*shape):
            if counts[i]:
                t[i][int(labels[i])] = 1
                norm[i] *= c[int(labels[i])]
    a = float(label_smoothing)
    t = c * ((1 - a) * t + a * possible / max(possible.sum(), 1))
    return x, t, counts, w, norm


def _row_loss(x, t, z):
    s = np.exp(x - x.max())
    s = s / s.sum()
    lse = x.max() + np.log(np.exp(x - x.max()).sum())
    return -sum(tk * np.log(sk) for tk, sk in zip(t, s, strict=True) if tk) + z * lse**2


def _row_gradient(x, t, z):
    s = np.exp(x - x.max())
    s = s / s.sum()
    lse = x.max() + np.log(np.exp(x - x.max()).sum())
    return t.sum() * s - t + 2 * z * lse * s


def loss(logits, labels, *, reduction="mean", z_loss=0.0, **options):
    """The value of the loss, float64."""
    x, t, counts, w, norm = rows(logits, labels, **options)
    each = np.zeros(counts.shape)
    with np.errstate(divide="ignore"):
        for i in np.ndindex(*counts.shape):
            if counts[i]:
                each[i] = w[i] * _row_loss(x[i], t[i], float(z_loss))
    if reduction == "none":
        return each
    total, weight = each.sum(), (norm * counts).sum()
    return total if reduction == "sum" else total / weight if weight else 0.0


def gradient(logits, labels, g=1.0, *, reduction="mean", z_loss=0.0, axis=-1, **options):
    """The gradient of sum(g * loss) with respect to the logits, float64, in their shape."""
    x, t, counts, w, norm = rows(logits, labels, axis=axis, **options)
    each = np.zeros(x.shape)
    weight = (norm * counts).sum()
    if reduction == "mean":
        g = g / weight if weight else 0.0
    g = np.broadcast_to(g, counts.shape)
    for i in np.ndindex(*counts.shape):
        if counts[i]:
            each[i] = g[i] * w[i] * _row_gradient(x[i], t[i], float(z_loss))
    where = options.get("where")
    if where is not None and np.shape(where) == np.shape(logits):
        each = np.where(_rows_last(np.asarray(where), axis), each, 0)
    if options.get("class_mask") is not None:
        each = np.where(np.asarray(options["class_mask"]), each, 0)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    shape = np.shape(logits)
    each = each.reshape(*counts.shape, *(shape[a] for a in axes))
    return np.moveaxis(each, range(-len(axes), 0), axes)


def check_rows_metrics(metrics, x, counts, labels=None):
    """Check what the metrics say of each row, from its logits x [..., K] and whether it counts.

    Without labels there must be no label_rank.
    """
    x, counts = np.asarray(x).astype(np.float64), np.asarray(counts)
    x = np.where(counts[..., None], x, 0)
    e = np.exp(x - x.max(-1, keepdims=True))
    lse = x.max(-1) + np.log(e.sum(-1))
    assert_close(metrics.lse, np.where(counts, lse, 0))
    assert_close(metrics.max_probability, np.where(counts, 1 / e.sum(-1), 0))
    q = e / e.sum(-1, keepdims=True)
    log_q = np.where(q > 0, x - lse[..., None], 0)  # 0 log 0 = 0
    assert_close(metrics.entropy, np.where(counts, -(q * log_q).sum(-1), 0))
    np.testing.assert_array_equal(metrics.predictions, np.where(counts, x.argmax(-1), -1))
    assert metrics.predictions.dtype == np.int32
    if labels is None:
        assert metrics.label_rank is None
        return
    label = np.where(counts, labels, 0).astype(int)[..., None]
    rank = (x > np.take_along_axis(x, label, -1)).sum(-1)
    np.testing.assert_array_equal(metrics.label_rank, np.where(counts, rank, x.shape[-1]))
    assert metrics.label_rank.dtype == np.int32


def exact_row(x, t):
    """D0 and its gradient for one row in 60-digit arithmetic: (loss, [gradient]), as mpf."""
    with mpmath.workdps(DIGITS):
        x = [mpmath.mpf(float(v)) for v in x]
        t = [mpmath.mpf(float(v)) for v in t]
        top = max(x)
        e = [mpmath.exp(v - top) for v in x]
        s = mpmath.fsum(e)
        row_loss = mpmath.fsum(-tk * mpmath.log(ek / s) for tk, ek in zip(t, e, strict=True) if tk)
        total = mpmath.fsum(t)
        return row_loss, [total * ek / s - tk for tk, ek in zip(t, e, strict=True)]


def exact_targets(label, classes, label_smoothing=0.0, class_weights=None):
    """t_k = c_k ((1 - a) [k = y] + a / K) of one row, in 60-digit arithmetic."""
    with mpmath.workdps(DIGITS):
        a = mpmath.mpf(float(label_smoothing))
        c = [
            mpmath.mpf(float(v))
            for v in (np.ones(classes) if class_weights is None else class_weights)
        ]
        return [c[k] * ((1 - a) * (k == label) + a / classes) for k in range(classes)]


def gradient_errors(actual, x, t):
    """The error of a row's gradient, entry by entry, relative to the two terms of the exact one.

    They are q_l (T - t_l) and t_l (1 - q_l), of which D7 is the difference. Where their sum, in
    units of T if that is more than 1, is below float32's normal numbers, any finite gradient has an
    error of 0.
    """
    with mpmath.workdps(DIGITS):
        x, t = (
            [v if isinstance(v, mpmath.mpf) else mpmath.mpf(float(v)) for v in a] for a in (x, t)
        )
        e = [mpmath.exp(v - max(x)) for v in x]
        s, total = mpmath.fsum(e), mpmath.fsum(t)
        errors, least = [], 1e-37 * max(1, total)
        for a, e_l, t_l in zip(actual, e, t, strict=True):
            terms = e_l / s * (total - t_l), t_l * (s - e_l) / s
            size = sum(terms)
            error = abs(mpmath.mpf(float(a)) - (terms[0] - terms[1]))
            errors.append(float(error / size) if size > least else 0.0 * float(a))
        return errors


def relative_error(actual, exact):
    """|actual - exact| / |exact| for floats and mpf, computed exactly."""
    with mpmath.workdps(DIGITS):
        return float(abs(mpmath.mpf(float(actual)) - exact) / abs(exact))


def head(hidden, kernel, *, bias=None, logit_scale=1.0, softcap=None):
    """The head's logits [..., K] in float64, and what takes their gradient to those by name."""
    h, w = np.asarray(hidden).astype(np.float64), np.asarray(kernel).astype(np.float64)
    u = h @ w
    scale = np.asarray(logit_scale).astype(np.float64)
    scale = scale[..., None] if scale.ndim else scale
    z = scale * u + (0 if bias is None else np.asarray(bias).astype(np.float64))
    cap = None if softcap is None else float(softcap)
    x = z if cap is None else cap * np.tanh(z / cap)

    def pullback(d_x):
        rows = tuple(range(d_x.ndim - 1))
        slope = 1.0 if cap is None else 1 / np.cosh(z / cap) ** 2
        d_z = d_x * slope
        gradients = {
            "hidden": scale * (d_z @ w.T),
            "kernel": np.tensordot(h, scale * d_z, (rows, rows)),
            "bias": d_z.sum(rows),
            "logit_scale": np.sum(d_z * u, axis=-1 if scale.ndim else None),
        }
        if cap is not None:
            gradients["softcap"] = np.sum(d_x * (np.tanh(z / cap) - z / cap * slope))
        return gradients

    return x, pullback


def _apart(options):
    projection = {k: v for k, v in options.items() if k in ("bias", "logit_scale", "softcap")}
    return projection, {k: v for k, v in options.items() if k not in projection}


def head_loss(hidden, kernel, labels, **options):
    """The value of the head's loss, float64."""
    projection, rest = _apart(options)
    return loss(head(hidden, kernel, **projection)[0], labels, **rest)


def head_gradients(hidden, kernel, labels, g=1.0, **options):
    """The gradients of sum(g * loss) for hidden, kernel, bias, logit_scale and softcap, by name."""
    projection, rest = _apart(options)
    x, pullback = head(hidden, kernel, **projection)
    return pullback(gradient(x, labels, g, **rest))
