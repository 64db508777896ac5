"""JAX's tools that rewrite or watch programs, applied to programs that contain the losses.

Some tools process every operation, some know only JAX's own. ``jax.export`` has its own file.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.experimental import checkify, jet, serialize_executable, sparse
from jax.experimental.roofline import roofline
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import sxe

N, D, K = 6, 3, 5
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((N, K)).astype(np.float32)
HIDDEN = RNG.standard_normal((N, D)).astype(np.float32)
KERNEL = RNG.standard_normal((D, K)).astype(np.float32)
LABELS = np.array([0, 2, 4, 1, 2, 3])
DENSE = RNG.random((N, K)).astype(np.float32)


def of_logits(**options):
    return functools.partial(sxe.softmax_cross_entropy, **options), (LOGITS,)


def of_hidden(**options):
    """The head in chunks, so that the program has a loop."""
    options = {"chunk_size": 4} | options
    return functools.partial(sxe.linear_softmax_cross_entropy, **options), (HIDDEN, KERNEL)


each_loss = pytest.mark.parametrize("loss", [of_logits, of_hidden])
each_rule = pytest.mark.parametrize(
    ("rule", "labels"),
    [("vjp", LABELS), ("jvp", DENSE), ("autodiff", LABELS)],
    ids=["vjp", "jvp-dense", "autodiff"],
)


def expected(args, labels, **options):
    """The loss and its gradient for the first argument."""
    logits = args[0] if len(args) == 1 else args[0].astype(np.float64) @ args[1]
    gradient = oracle.gradient(logits, labels, **options)
    gradient = gradient if len(args) == 1 else gradient @ args[1].T
    return oracle.loss(logits, labels, **options), gradient


def on_device(args):
    return jax.tree.map(jnp.asarray, args)


# jet


def along_a_line(x, v, t):
    """d^n/ds^n at s = 0, n = 0 to 3, of the mean over rows of the loss of x + s v for targets t.

    The derivatives of lse are the cumulants of v under the probabilities softmax(x).
    """
    q = np.exp(x - x.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    total, mean = t.sum(-1), (q * v).sum(-1)
    d1 = total * mean - (t * v).sum(-1)
    d2, d3 = (total * (q * (v - mean[:, None]) ** n).sum(-1) for n in (2, 3))
    return np.array([oracle.loss(x, t), d1.mean(), d2.mean(), d3.mean()])


@pytest.mark.parametrize("labels", [LABELS, DENSE], ids=["integer", "dense"])
@pytest.mark.parametrize("head", [False, True], ids=["logits", "head"])
def test_jet(head, labels):
    """Also for equal logits and a confident row. The head has one chunk: jet has no loops."""
    x, kernel, direction = (RNG.standard_normal(shape) for shape in ((N, D), (D, K), (N, D)))
    x[0], x[1] = 0, 20 * x[1]
    logits, line = x @ kernel, direction @ kernel
    t = labels.astype(np.float64) if labels.ndim == 2 else np.eye(K)[labels]
    with jax.enable_x64(True):
        f = functools.partial(sxe.softmax_cross_entropy, labels=labels, rule="autodiff")
        at, to = logits, line
        if head:
            f = functools.partial(sxe.linear_softmax_cross_entropy, kernel=kernel, labels=labels)
            f = functools.partial(f, rule="autodiff", chunk_size=N)
            at, to = x, direction
        zero = np.zeros(at.shape)
        value, terms = jet.jet(f, (at,), ((to, zero, zero),))
        assert_close(jnp.stack([value, *terms]), along_a_line(logits, line, t))


MASK = np.ones((N, K), bool)
MASK[0, 3] = False


@pytest.mark.parametrize("options", [{"where": MASK, "z_loss": 0.1}, {"label_smoothing": 0.1}])
def test_jet_with_options(options):
    """The derivatives along a line, compared with repeated forward mode."""
    x, direction = jnp.asarray(RNG.standard_normal((2, N, K)), jnp.float32)
    options = {"class_weights": jnp.ones(K), "weights": jnp.ones(N)} | options

    def along(s, rule):
        return sxe.softmax_cross_entropy(x + s * direction, LABELS, rule=rule, **options)

    _, terms = jet.jet(lambda s: along(s, "autodiff"), (jnp.float32(0),), ((1.0, 0.0),))
    by_jvp = jax.grad(along), jax.grad(jax.grad(along))
    assert_close(jnp.stack(terms), jnp.stack([f(jnp.float32(0), "jvp") for f in by_jvp]))


def test_jet_under_a_softcap_says_what_to_do():
    f = functools.partial(sxe.linear_softmax_cross_entropy, rule="autodiff", softcap=3.0)
    x = jnp.ones((N, D))
    with pytest.raises(ValueError, match=r"softcap: expected None .*jet.*, got 3\.0"):
        jet.jet(lambda x: f(x, jnp.ones((D, K)), LABELS), (x,), ((x,),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_softcap": 3.0}, r"^target_softcap: expected None .*jet.*sxe\.kl_divergence"),
        ({"chunk_size": 1}, r"^hidden: expected rows that fit into one chunk, .*kl_divergence"),
    ],
)
def test_jet_of_a_divergence_says_what_to_do(options, message):
    x, kernel = jnp.ones((N, D)), jnp.ones((D, K))
    f = functools.partial(sxe.linear_kl_divergence, rule="autodiff", **options)
    with pytest.raises(ValueError, match=message):
        jet.jet(lambda x: f(x, kernel, x, kernel), (x,), ((x,),))


def test_jet_of_a_loop_and_of_the_value_with_gradient_says_what_to_do():
    x = jnp.ones((N, D))
    f = functools.partial(sxe.linear_softmax_cross_entropy, rule="autodiff", chunk_size=1)
    with pytest.raises(ValueError, match=r"hidden: expected rows that fit into one chunk, .*jet"):
        jet.jet(lambda x: f(x, jnp.ones((D, K)), LABELS), (x,), ((x,),))
    x = jnp.ones((N, K))
    with pytest.raises(ValueError, match=r"rule: expected 'autodiff' .*jet.*softmax_cross_entropy"):
        jet.jet(lambda x: sxe.softmax_cross_entropy_with_gradient(x, LABELS), (x,), ((x,),))


@each_loss
@pytest.mark.parametrize("rule", ["vjp", "jvp"])
def test_jet_of_a_custom_rule_says_what_to_do(loss, rule):
    """JAX's own error, as for ``jax.nn.relu``, would only say that a tracer has escaped."""
    f, args = loss(rule=rule)
    with pytest.raises(ValueError, match=f"rule: expected 'autodiff' .*jet.*, got '{rule}'"):
        jet.jet(lambda x: f(x, *args[1:], LABELS), args[:1], (args[:1],))


# Key reuse


@each_loss
@each_rule
def test_key_reuse_is_found_and_nothing_else(loss, rule, labels):
    f, args = loss(rule=rule)

    def step(key, x, reuse):
        key, noise = jax.random.split(key)
        x = x + jax.random.normal(noise, x.shape)
        gradient = jax.grad(f)(x, *args[1:], labels)
        return jax.random.normal(noise if reuse else key, x.shape) + gradient

    step = jax.jit(step, static_argnums=2)
    with jax.debug_key_reuse(True):
        step(jax.random.key(0), args[0], False)
        with pytest.raises(jax.errors.KeyReuseError):
            step(jax.random.key(0), args[0], True)


# checkify


@each_loss
@pytest.mark.parametrize("errors", ["user_checks", "all_checks"])
def test_checkify(loss, errors):
    """With the default rule: JAX fails to check the indices in the gradient of a gather."""
    f, args = loss()
    f = jax.jit(checkify.checkify(jax.value_and_grad(f), errors=getattr(checkify, errors)))
    error, (value, gradient) = f(*args, LABELS)
    assert error.get() is None
    assert_close(value, expected(args, LABELS)[0])
    assert_close(gradient, expected(args, LABELS)[1])
    message = f(*args, np.where(np.arange(N) == 3, 9, LABELS))[0].get()
    assert "class indices in [0, 5), got 9 at position [3];" in message


# The check of labels inside of vmap, on an Explicit mesh

MAPPED = {  # in_axes of vmaps, the outermost first; and the index and position of [5, 1]
    "0": ([0], [5], [1]),
    "1": ([1], [1], [5]),
    "0, 0": ([0, 0], [5, 1], []),
    "1, 0": ([1, 0], [1, 5], []),
}


@pytest.mark.parametrize(
    ("devices", "spec", "vmaps"),
    [*((8, P("data"), vmaps) for vmaps in MAPPED), (8, P(), "1"), (1, P("data"), "1")],
    ids=[*MAPPED, "not split", "one device"],
)
def test_vmap_on_an_explicit_mesh(devices, spec, vmaps):
    in_axes, index, position = MAPPED[vmaps]
    logits, labels = RNG.standard_normal((8, 3, K)).astype(np.float32), np.arange(24) % K
    labels = labels.reshape(8, 3)
    losses = oracle.loss(logits, labels, reduction="none")
    f = functools.partial(sxe.softmax_cross_entropy, reduction="none")
    for axis in reversed(in_axes):
        f = jax.vmap(f, in_axes=axis)
    losses = losses.T if in_axes[0] == 1 else losses
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Explicit,))
    bad = labels.copy()
    bad[5, 1] = 77
    with jax.set_mesh(mesh):
        x, y, bad = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (logits, labels, bad))
        assert_close(f(x, y), losses)
        assert_close(jax.jit(f)(x, y), losses)
        message = checkify.checkify(f)(x, bad)[0].get()
    place = f"at position {np.array(position, int)}, index {np.array(index)} of jax.vmap;"
    assert f"got 77 {place}" in message


@pytest.mark.parametrize("rank", [1, 3])
def test_vmap_with_spmd_axis_name(rank):
    """A batch of labels [8] and [8, 2, 3], sharded along the mapped axis."""
    shape = (8, 2, 3)[:rank]
    logits = RNG.standard_normal((*shape, K)).astype(np.float32)
    labels = np.arange(np.prod(shape)).reshape(shape) % K
    losses = oracle.loss(logits, labels, reduction="none")
    f = jax.vmap(sxe.softmax_cross_entropy, spmd_axis_name="data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, y = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (logits, labels))
        assert_close(f(x, y), losses.mean(tuple(range(1, rank))))
        assert_close(jax.jit(f)(x, y), losses.mean(tuple(range(1, rank))))


def test_vmap_of_logits_alone_names_the_label():
    """The check has labels [2] and, because of the mask, mapped rows [4, 2]."""
    where = np.ones((4, 2), bool)
    where[:3] = False
    f = jax.vmap(lambda x, where: sxe.softmax_cross_entropy(x, np.array([1, 9]), where=where))
    message = checkify.checkify(f)(np.zeros((4, 2, K), np.float32), where)[0].get()
    assert "got 9 at position [1], index [3] of jax.vmap" in message


# Programs that are rewritten, decomposed or stored, and run again


def by_jaxpr(f, *args):
    return jaxpr_as_fun(jax.make_jaxpr(f)(*args))(*args)


def by_closure_convert(f, *args):
    converted, constants = jax.closure_convert(lambda x: f(x, *args[1:]), args[0])
    return converted(args[0], *constants)


def by_fwd_and_bwd(f, *args):
    fwd, bwd = jax.fwd_and_bwd(lambda *args: f(*args)[0], argnums=0)
    value, residuals = fwd(*args)
    return value, bwd(residuals, jnp.ones_like(value))


def by_executable(f, *args):
    compiled = jax.jit(f).lower(*args).compile()
    assert compiled.cost_analysis()["flops"] > 0
    stored, *trees = serialize_executable.serialize(compiled)
    device = jax.devices()[:1]
    return serialize_executable.deserialize_and_load(stored, *trees, execution_devices=device)(
        *args
    )


@each_loss
@pytest.mark.parametrize("again", [by_jaxpr, by_closure_convert, by_fwd_and_bwd, by_executable])
def test_run_again(loss, again):
    f, args = loss()
    value, gradient = again(jax.value_and_grad(f), *on_device(args), jnp.asarray(LABELS))
    assert_close(value, expected(args, LABELS)[0])
    assert_close(gradient, expected(args, LABELS)[1])


@each_loss
def test_sparsify(loss):
    """For dense arrays. JAX fails for all functions with custom rules, also ``jax.nn.relu``."""
    f, args = loss(rule="autodiff")
    value, gradient = sparse.sparsify(jax.value_and_grad(f))(*on_device(args), jnp.asarray(LABELS))
    assert_close(value, expected(args, LABELS)[0])
    assert_close(gradient, expected(args, LABELS)[1])


@each_loss
@each_rule
def test_roofline(loss, rule, labels):
    f, args = loss(rule=rule)
    shapes, result = roofline(jax.value_and_grad(f))(*args, labels)
    assert [s.shape for s in jax.tree.leaves(shapes)] == [(), args[0].shape]
    assert result.unfused_flops > 4 * N * K  # exp, and the gradient of each logit


@each_loss
@each_rule
def test_saved_residuals(loss, rule, labels, capsys):
    """Of the arrays as large as the logits, only the arguments are saved. JAX saves more."""
    f, args = loss(rule=rule)
    print_saved_residuals(f, *args, labels)
    saved = capsys.readouterr().out.count(f"f32[{N},{K}]")
    given = sum(a.shape == (N, K) for a in (*args, labels))
    if loss is of_logits and rule == "autodiff":
        assert saved > given
    else:
        assert saved <= given


# Settings that watch a program


@each_loss
@each_rule
def test_checks_of_jax_itself(loss, rule, labels):
    """Checks of leaked tracers, and of types in programs."""
    f, args = loss(rule=rule)
    with jax.checking_leaks(), jax.enable_checks(True):
        value, gradient = jax.jit(jax.value_and_grad(f))(*args, labels)
    assert_close(value, expected(args, labels)[0])
    assert_close(gradient, expected(args, labels)[1])
