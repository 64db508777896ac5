"""Train one network twice on addition modulo a prime, with optax's loss and with sxe's.

DOC
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

import sxe

# Losses of the rows, of logits [N, K] and labels [N].
LOSSES = {
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "sxe": functools.partial(sxe.softmax_cross_entropy, reduction="none"),
}

# Seconds rather than minutes, and optax's loss collapses all the same.
SMOKE = {"modulus": 11, "width": 64, "steps": 2500, "learning_rate": 3e-3}

HEADER = """\
                  training loss          rows at 0          row         accuracy   largest
  step          computed     exact     loss  gradient       sum     train   test     logit"""
ROW = (
    "{step:6,} {name:6} {computed:11.2e} {exact:9.2e} {no_loss:8.1%} {no_gradient:9.1%} "
    "{row_sum:9.1e} {train:9.1%} {test:6.1%} {logit:9,.0f}"
)


def make_data(modulus, train_share, seed):
    """Pairs (a, b) as two one-hot vectors, and a + b mod p: those to train on, and the rest."""
    a, b = np.divmod(np.random.default_rng(seed).permutation(modulus**2), modulus)
    one_hot = np.eye(modulus)
    x = np.concatenate([one_hot[a], one_hot[b]], axis=1)
    labels = ((a + b) % modulus).astype(np.int32)
    n = round(train_share * len(labels))
    return (x[:n], labels[:n]), (x[n:], labels[n:])


def init_params(key, sizes, dtype):
    """The kernels of a perceptron without biases, drawn as PyTorch's `Linear` draws them.

    In float32, so that float64 starts from the same network.
    """
    uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    shapes = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    kernels = [uniform(k, shape, jnp.float32) for k, shape in zip(keys, shapes, strict=True)]
    return [kernel.astype(dtype) for kernel in kernels]


def apply(params, x):
    *hidden, last = params
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return x @ last


@functools.partial(jax.jit, static_argnames="loss_fn")
def measure(loss_fn, params, train_set, test_set):
    """What is logged of a network and its loss, and the logits of the training rows."""
    (x, labels), (test_x, test_labels) = train_set, test_set
    logits = apply(params, x)
    losses, vjp = jax.vjp(lambda logits: loss_fn(logits, labels), logits)
    (gradient,) = vjp(jnp.ones_like(losses))
    size = jnp.abs(gradient).sum(axis=1)
    return logits, {
        "computed": losses.mean(),
        "no_loss": jnp.mean(losses == 0),
        "no_gradient": jnp.mean(jnp.take_along_axis(gradient, labels[:, None], axis=1) == 0),
        # In units of the row's absolute sum: 0 for q - y, 1 once the label's part is gone.
        "row_sum": jnp.mean(jnp.abs(gradient.sum(axis=1)) / jnp.where(size == 0, 1, size)),
        "train": jnp.mean(logits.argmax(axis=1) == labels),
        "test": jnp.mean(apply(params, test_x).argmax(axis=1) == test_labels),
        "logit": jnp.abs(logits).max(),
    }


def exact_loss(logits, labels):
    """The mean loss in float64, as log(1 + sum of the others), which keeps the digits of a sum."""
    x = np.asarray(logits, np.float64)
    rows = np.arange(len(x))
    gaps = x - x[rows, labels][:, None]
    gaps[rows, labels] = -np.inf
    return np.logaddexp(0, np.logaddexp.reduce(gaps, axis=1)).mean()


def train(args, train_set, test_set):
    """Train with both losses, and return for each loss what was logged, from the start on."""
    x, labels = train_set
    sizes = (2 * args.modulus, args.width, args.width, args.modulus)
    params = init_params(jax.random.key(args.seed), sizes, args.dtype)
    optimizer = optax.adam(args.learning_rate, b2=0.99, eps=args.eps)

    def step(loss_fn, params, opt_state):
        grads = jax.grad(lambda params: loss_fn(apply(params, x), labels).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    @functools.partial(jax.jit, static_argnames="steps")
    def advance(states, steps):
        def both(states, _):
            return {name: step(LOSSES[name], *state) for name, state in states.items()}, None

        return jax.lax.scan(both, states, length=steps)[0]

    states = {name: (params, optimizer.init(params)) for name in LOSSES}
    history = {name: [] for name in LOSSES}

    def log(step):
        for name, loss_fn in LOSSES.items():
            logits, values = measure(loss_fn, states[name][0], train_set, test_set)
            values = {key: float(value) for key, value in values.items()}
            history[name].append(values | {"step": step, "exact": exact_loss(logits, labels)})

    log(0)
    with tqdm(total=args.steps, desc="training", unit="step") as progress:
        while progress.n < args.steps:
            steps = min(args.log_every, args.steps - progress.n)
            states = advance(states, steps)
            progress.update(steps)
            log(progress.n)
    return history


def report(history):
    """A table of about ten of the steps logged."""
    print(HEADER)
    n = len(history["sxe"])
    for i in np.unique(np.linspace(0, n - 1, 11).round().astype(int)):
        for name, logged in history.items():
            print(ROW.format(name=name, **logged[i]))


def draw(history, title, path):
    panels = {
        "Training loss (nats)": {"computed": "computed", "exact": "exact"},
        "Training rows at 0": {"loss": "no_loss", "gradient at the label": "no_gradient"},
        "Accuracy": {"on held-out pairs": "test", "in training": "train"},
        "Largest logit": {"": "logit"},
    }
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2, sharex=True)
    for ax, (panel, lines) in zip(axes.flat, panels.items(), strict=True):
        for color, (name, logged) in zip(("C1", "C0"), history.items(), strict=True):
            steps = [values["step"] for values in logged]
            for style, (label, key) in zip(("-", ":"), lines.items(), strict=False):
                curve = [values[key] for values in logged]
                ax.plot(steps, curve, style, color=color, label=f"{name}, {label}".strip(", "))
        ax.set_title(panel, fontsize="medium")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    for ax in (axes[0, 0], axes[1, 1]):
        ax.set_yscale("log")
    for ax in (axes[0, 1], axes[1, 0]):
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    for ax in axes[1]:
        ax.set_xlabel("step")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description="Train on modular addition with optax's loss and with sxe's, and compare."
    )
    parser.add_argument("--modulus", type=int, default=113)
    parser.add_argument("--train-share", type=float, default=0.6, help="of all pairs")
    parser.add_argument("--width", type=int, default=200, help="of both hidden layers")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-18, help="of Adam; optax's own is 1e-8")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="collapse.png", help="where to write the figure")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, in seconds")
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()
    if not 0 < args.train_share < 1:
        parser.error(f"--train-share must lie between 0 and 1, not {args.train_share}")

    jax.config.update("jax_enable_x64", args.dtype == "float64")
    train_set, test_set = (
        (jnp.asarray(x, args.dtype), labels)
        for x, labels in make_data(args.modulus, args.train_share, args.seed)
    )
    history = train(args, train_set, test_set)
    report(history)
    title = f"Addition modulo {args.modulus}, {args.train_share:.0%} of the pairs, {args.dtype}"
    draw(history, title, args.figure)
    print(f"curves: {args.figure}")


if __name__ == "__main__":
    main()
