"""The loss, log-probabilities, entropies and divergences, in float64 NumPy and in 60 digits.

Nothing here calls sxe or is optimized for speed. The functions are lines D0, E0, K0, K2 and K4 of
the derivation, in their textbook forms. The gradients are lines D7, E1, K1, K3 and K5.
``test_oracle.py`` checks them against central differences.
"""

import contextlib
import math

import mpmath
import numpy as np
from tolerances import CLOSENESS

DIGITS = 60


def assert_close(actual, expected, dtype=None, scale=None):
    """Fail unless actual equals expected, up to the closeness of its dtype.

    The closeness is relative to the largest expected entry, or to ``scale``. ``dtype`` selects the
    closeness of another dtype.
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
    """Add notes to an error that say where it comes from."""
    try:
        yield
    except Exception as error:
        error.add_note(" ".join(map(str, what)))
        raise


def _rows_last(x, axis):
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    x = np.moveaxis(x, axes, range(-len(axes), 0))
    rows = x.ndim - len(axes)
    return x.reshape(*x.shape[:rows], math.prod(x.shape[rows:]))


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
    """Logits x, targets t, whether each row counts, its weight, and its share of the mean."""
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
    """The gradient of sum(g * loss) for the logits, float64, in their shape."""
    x, t, counts, w, norm = rows(logits, labels, axis=axis, **options)
    each = np.zeros(x.shape)
    weight = (norm * counts).sum()
    if reduction == "mean":
        g = g / weight if weight else 0.0
    g = np.broadcast_to(g, counts.shape)
    for i in np.ndindex(*counts.shape):
        if counts[i]:
            each[i] = g[i] * w[i] * _row_gradient(x[i], t[i], float(z_loss))
    return _in_shape_of(logits, each, axis, options)


def _in_shape_of(logits, each, axis, options):
    """Gradients [..., K] in the shape of the logits, with 0 for masked classes."""
    where = options.get("where")
    if where is not None and np.shape(where) == np.shape(logits):
        each = np.where(_rows_last(np.asarray(where), axis), each, 0)
    if options.get("class_mask") is not None:
        each = np.where(np.asarray(options["class_mask"]), each, 0)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    shape = np.shape(logits)
    each = each.reshape(*each.shape[:-1], *(shape[a] for a in axes))
    return np.moveaxis(each, range(-len(axes), 0), axes)


def _log_softmax(x):
    """NaN for logits without a distribution: all -inf, or with +inf or NaN."""
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def log_prob_and_entropy(logits, labels, **options):
    """log q_y and -sum_k q_k log q_k of each row, float64, with 0 in rows that do not count."""
    x, t, counts, *_ = rows(logits, labels, **options)
    log_prob, entropy = np.zeros(counts.shape), np.zeros(counts.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in np.ndindex(*counts.shape):
            if counts[i]:
                log_q = _log_softmax(x[i])
                possible = log_q != -np.inf
                log_prob[i] = log_q[t[i].argmax()]
                entropy[i] = -(np.exp(log_q) * log_q)[possible].sum()
    return log_prob, entropy


def log_prob_and_entropy_gradient(logits, labels, g, *, axis=-1, **options):
    """The gradient of sum(g[0] * log_prob + g[1] * entropy) for the logits, float64."""
    x, t, counts, *_ = rows(logits, labels, axis=axis, **options)
    g = [np.broadcast_to(np.asarray(a).astype(np.float64), counts.shape) for a in g]
    each = np.zeros(x.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in np.ndindex(*counts.shape):
            if counts[i]:
                log_q = _log_softmax(x[i])
                q = np.exp(log_q)
                possible = log_q != -np.inf
                h = -(q * log_q)[possible].sum()
                d_entropy = np.where(possible, -q * (log_q + h), 0)
                each[i] = g[0][i] * (t[i] - q) + g[1][i] * d_entropy
    return _in_shape_of(logits, each, axis, options)


def _divergence(p, log_p, log_q):
    """sum_k p_k (log p_k - log q_k), with 0 log 0 = 0."""
    return (p * (log_p - log_q))[log_p != -np.inf].sum()


def _row_divergence(x, z, mode, beta):
    """The divergence of q = softmax(x) and p = softmax(z), and its gradients for x and z."""
    log_q, log_p = _log_softmax(x), _log_softmax(z)
    q, p = np.exp(log_q), np.exp(log_p)
    log_of_first, log_of_second = (log_p, log_q) if mode == "forward" else (log_q, log_p)
    if mode == "jensen_shannon":
        log_m = np.log(beta * p + (1 - beta) * q)
        of_p, of_q = _divergence(p, log_p, log_m), _divergence(q, log_q, log_m)
        d_x = np.where(q == 0, 0, (1 - beta) * q * (log_q - log_m - of_q))
        d_z = np.where(p == 0, 0, beta * p * (log_p - log_m - of_p))
        return beta * of_p + (1 - beta) * of_q, d_x, d_z
    first, second = np.exp(log_of_first), np.exp(log_of_second)
    value = _divergence(first, log_of_first, log_of_second)
    d_first = np.where(first == 0, 0, first * (log_of_first - log_of_second - value))
    d_second = second - first
    return (value, *((d_second, d_first) if mode == "forward" else (d_first, d_second)))


def _divergences(p, g, mode, beta, reduction):
    """What value and gradients need of the rows of a call with these arguments, by name."""
    p = dict(p)
    axis = p.pop("axis", -1)
    logits, target_logits = p.pop("logits"), p.pop("target_logits")
    scales = [np.asarray(p.pop(n, 1.0), np.float64) for n in ("logit_scale", "target_logit_scale")]
    weights = p.pop("weights", None)
    unscaled = _rows_last(np.asarray(logits).astype(np.float64), axis)
    labels = np.zeros(unscaled.shape[:-1], int)
    x, _, counts, *_ = rows(logits, labels, axis=axis, **p)
    z, *_ = rows(target_logits, labels, axis=axis, **p)
    w = np.ones(counts.shape) if weights is None else np.asarray(weights).astype(np.float64)
    total = (w * counts).sum()
    share = (1 / total if total else 0.0) if reduction == "mean" else 1.0
    g = np.broadcast_to(np.asarray(g, np.float64) * share, counts.shape)
    each, d_x, d_z = np.zeros(counts.shape), np.zeros(x.shape), np.zeros(x.shape)
    a, b = (s[..., None] if s.ndim else s for s in scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in np.ndindex(*counts.shape):
            if counts[i]:
                of_x, of_z = (np.broadcast_to(s, (*counts.shape, 1))[i] for s in (a, b))
                x_i, z_i = of_x * x[i], of_z * z[i]
                of_row = _row_divergence(x_i, z_i, mode, beta)
                if w[i] or np.isfinite(of_row[0]):
                    each[i], d_x[i], d_z[i] = of_row
    return each, w, counts, share, g, (x, d_x, a), (z, d_z, b)


def kl_divergence(*, mode="forward", beta=0.5, reduction="mean", **p):
    """The value of the divergence between logits and target_logits, float64."""
    each, w, _, share, *_ = _divergences(p, 1.0, mode, beta, reduction)
    each = w * each
    return each if reduction == "none" else each.sum() * share


def kl_divergence_gradients(g=1.0, *, mode="forward", beta=0.5, reduction="mean", **p):
    """The gradients of sum(g * divergence) for all arguments that have one, by name, float64.

    For a weight of 0, it is the divergence of the row, or 0 if this is not finite.
    """
    each, w, counts, share, g, *sides = _divergences(p, g, mode, beta, reduction)
    gradients, axis = {}, p.get("axis", -1)
    for name, scale_name, (x, d_x, scale) in zip(
        ("logits", "target_logits"), ("logit_scale", "target_logit_scale"), sides, strict=True
    ):
        d_x = (g * w)[..., None] * d_x
        gradients[name] = _in_shape_of(p[name], scale * d_x, axis, p)
        with np.errstate(invalid="ignore"):  # for rows with an infinite divergence
            d_scale = (np.where(d_x == 0, 0, x) * d_x).sum(-1)
        gradients[scale_name] = d_scale if np.ndim(scale) else d_scale.sum()
    mean = (w * each).sum() * share if reduction == "mean" else 0.0
    gradients["weights"] = np.where(counts, g * (each - mean), 0)
    return gradients


def check_rows_metrics(metrics, x, counts, labels=None):
    """Check the metrics of each row, given its logits x [..., K] and whether it counts.

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
    np.testing.assert_array_equal(metrics.predictions, np.where(counts, x.argmax(-1), -(2**31)))
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


def exact_log_prob_and_entropy(x, label):
    """log q_y, the entropy, and the gradient of the entropy of one row, in 60-digit arithmetic."""
    with mpmath.workdps(DIGITS):
        q, log_q = _exact_softmax(x)
        entropy = -mpmath.fsum(a * b for a, b in zip(q, log_q, strict=True))
        return log_q[label], entropy, [-a * (b + entropy) for a, b in zip(q, log_q, strict=True)]


def _exact_softmax(x):
    """q and log q of one row of finite logits, in 60-digit arithmetic."""
    x = [mpmath.mpf(float(v)) for v in x]
    lse = max(x) + mpmath.log(mpmath.fsum(mpmath.exp(v - max(x)) for v in x))
    log_q = [v - lse for v in x]
    return [mpmath.exp(v) for v in log_q], log_q


def exact_divergence(x, z, mode="forward", beta=0.5):
    """The same as ``_row_divergence``, for one row of finite logits, in 60-digit arithmetic."""
    with mpmath.workdps(DIGITS):
        (q, log_q), (p, log_p) = _exact_softmax(x), _exact_softmax(z)
        beta = mpmath.mpf(float(beta))

        def divergence(a, log_a, log_b):
            return mpmath.fsum(u * (v - w) for u, v, w in zip(a, log_a, log_b, strict=True))

        def of_first(a, log_a, log_b, factor=1):
            """The value, and the gradient for the logits of a, if b does not depend on them."""
            value = divergence(a, log_a, log_b)
            terms = zip(a, log_a, log_b, strict=True)
            return value, [factor * u * (v - w - value) for u, v, w in terms]

        def less(a, b):
            return [u - v for u, v in zip(a, b, strict=True)]

        if mode == "forward":
            value, d_z = of_first(p, log_p, log_q)
            return value, less(q, p), d_z
        if mode == "reverse":
            value, d_x = of_first(q, log_q, log_p)
            return value, d_x, less(p, q)
        log_m = [mpmath.log(beta * u + (1 - beta) * v) for u, v in zip(p, q, strict=True)]
        of_p, d_z = of_first(p, log_p, log_m, beta)
        of_q, d_x = of_first(q, log_q, log_m, 1 - beta)
        return beta * of_p + (1 - beta) * of_q, d_x, d_z


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
    """The error of each entry of a row's gradient, relative to the two terms of the exact entry.

    The terms are q_l (T - t_l) and t_l (1 - q_l); D7 is their difference. If the sum of the terms,
    in units of T if T is more than 1, is below the normal numbers of float32, any finite gradient
    has an error of 0.
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


def error_of_row(actual, exact):
    """The largest error of the entries of a row, in units of its largest exact entry."""
    with mpmath.workdps(DIGITS):
        errors = [abs(mpmath.mpf(float(a)) - e) for a, e in zip(actual, exact, strict=True)]
        # With NaN, the result of max() would depend on the order.
        return float(np.max([float(e) for e in errors]) / float(max(map(abs, exact))))


def relative_error(actual, exact):
    """|actual - exact| / |exact| for floats and mpf, computed exactly."""
    with mpmath.workdps(DIGITS):
        return float(abs(mpmath.mpf(float(actual)) - exact) / abs(exact))


def head(hidden, kernel, *, bias=None, logit_scale=1.0, softcap=None):
    """The head's logits [..., K], float64, and the function from their gradient to all others."""
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


def head_log_prob_and_entropy(hidden, kernel, labels, **options):
    """log_prob and entropy [...] of the head, float64."""
    projection, rest = _apart(options)
    return log_prob_and_entropy(head(hidden, kernel, **projection)[0], labels, **rest)


def head_log_prob_and_entropy_gradients(hidden, kernel, labels, g, **options):
    """The gradients of sum(g[0] * log_prob + g[1] * entropy), by name as ``head_gradients``."""
    projection, rest = _apart(options)
    x, pullback = head(hidden, kernel, **projection)
    return pullback(log_prob_and_entropy_gradient(x, labels, g, **rest))
