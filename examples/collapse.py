"""Train one network twice on addition modulo a prime, with optax's loss and with sxe's.

Once a network has learned its training rows, its logits grow unless weight decay limits them. If
the label's logit leads by far, the loss of the row rounds to 0 in float32. The gradient at the
label rounds to 0 as well, but the rest of the gradient does not. This is the softmax collapse of
Prieto et al., 2025 (arXiv 2501.04697).

The task, the perceptron and the share of training pairs are from that paper. Two networks start
from the same parameters and take steps of Adam on all training rows, in one jitted program. At
regular steps the script measures these values, which it prints and draws at the end:

- the loss as computed, and the exact loss of the same logits in float64;
- the share of training rows whose loss is exactly 0, and the share whose gradient at the label is;
- the sum of a row of the gradient, relative to the sum of the magnitudes of its entries;
- the accuracy on training pairs and on held-out pairs, and the largest logit.

To run it:

    python examples/collapse.py --figure collapse.png

By default, optax's loss is 0 in nearly all rows from about step 3,000 on, the logits drift into the
thousands, and the accuracy on held-out pairs stays at 17 %. sxe's loss keeps falling to 3e-16, and
the held-out accuracy rises to 41 % by the end (19 % and 41 % with --seed 1). With --dtype float64
--steps 3600 both losses reach 22.6 %. In float32, the same steps reach 15.4 % with optax's loss and
22.7 % with sxe's.

With two other settings, the network does not generalize. With --modulus 47 --steps 10000 optax's
loss collapses too, but the held-out accuracy ends below 1 % with both losses. With --eps 1e-8,
optax's default, Adam's steps shrink as soon as gradients are smaller than eps. An exact loss alone
does not help much then: the accuracy is 13 % with optax's loss and 17 % with sxe's. The authors'
code has an eps of 1e-25. The default of this script is 1e-18, because float32 cannot hold the
square of a gradient below 1e-19, and Adam would divide such a gradient by eps alone.
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

# Each function maps logits [N, K] and labels [N] to the losses of the rows [N].
LOSSES = {
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "sxe": functools.partial(sxe.softmax_cross_entropy, reduction="none"),
}

# Takes seconds instead of minutes. optax's loss collapses here, too.
SMOKE = {"modulus": 11, "width": 64, "steps": 2500, "learning_rate": 3e-3}

HEADER = """\
                  training loss          rows at 0          row         accuracy   largest
  step          computed     exact     loss  gradient       sum     train   test     logit"""
ROW = (
    "{step:6,} {name:6} {computed:11.2e} {exact:9.2e} {no_loss:8.1%} {no_gradient:9.1%} "
    "{row_sum:9.1e} {train:9.1%} {test:6.1%} {logit:9,.0f}"
)


def make_data(modulus, train_share, seed):
    """A training and a test set: pairs (a, b) as two one-hot vectors, and labels a + b mod p."""
    a, b = np.divmod(np.random.default_rng(seed).permutation(modulus**2), modulus)
    one_hot = np.eye(modulus)
    x = np.concatenate([one_hot[a], one_hot[b]], axis=1)
    labels = ((a + b) % modulus).astype(np.int32)
    n = round(train_share * len(labels))
    return (x[:n], labels[:n]), (x[n:], labels[n:])


def init_params(key, sizes, dtype):
    """The kernels of a perceptron without biases, drawn as PyTorch's `Linear` draws them.

    They are drawn in float32, so that float64 starts from the same network.
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
    """The logits of the training rows, and the values to log for a network and its loss."""
    (x, labels), (test_x, test_labels) = train_set, test_set
    logits = apply(params, x)
    losses, vjp = jax.vjp(lambda logits: loss_fn(logits, labels), logits)
    (gradient,) = vjp(jnp.ones_like(losses))
    size = jnp.abs(gradient).sum(axis=1)
    return logits, {
        "computed": losses.mean(),
        "no_loss": jnp.mean(losses == 0),
        "no_gradient": jnp.mean(jnp.take_along_axis(gradient, labels[:, None], axis=1) == 0),
        # 0 for the exact gradient, softmax - one_hot; 1 if the label's entry is 0 instead.
        "row_sum": jnp.mean(jnp.abs(gradient.sum(axis=1)) / jnp.where(size == 0, 1, size)),
        "train": jnp.mean(logits.argmax(axis=1) == labels),
        "test": jnp.mean(apply(params, test_x).argmax(axis=1) == test_labels),
        "logit": jnp.abs(logits).max(),
    }


def exact_loss(logits, labels):
    """The mean of log(1 + sum of exp(gap)) in float64; a gap is a logit minus the label's logit."""
    x = np.asarray(logits, np.float64)
    rows = np.arange(len(x))
    gaps = x - x[rows, labels][:, None]
    gaps[rows, labels] = -np.inf
    return np.logaddexp(0, np.logaddexp.reduce(gaps, axis=1)).mean()


def train(args, train_set, test_set):
    """Train with both losses, and return the logged values of each, from step 0 on."""
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
    """Print a table of about ten of the logged steps."""
    print(HEADER)
    n = len(history["sxe"])
    for i in np.unique(np.linspace(0, n - 1, 11).round().astype(int)):
        for name, logged in history.items():
            print(ROW.format(name=name, **logged[i]))


def draw(history, title, path):
    panels = {
        "Training loss in nats (dotted: exact; 0 is not drawn)": ("computed", "exact"),
        "Training rows with a loss of 0 (dotted: label's gradient)": ("no_loss", "no_gradient"),
        "Accuracy on held-out pairs (dotted: in training)": ("test", "train"),
        "Largest logit": ("logit",),
    }
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2, sharex=True)
    for ax, (panel, keys) in zip(axes.flat, panels.items(), strict=True):
        for color, (name, logged) in zip(("C1", "C0"), history.items(), strict=True):
            steps = [values["step"] for values in logged]
            for style, key in zip(("-", ":"), keys, strict=False):
                ax.plot(steps, [values[key] for values in logged], color + style, label=name)
        ax.set_title(panel, fontsize="medium")
        ax.grid(alpha=0.3)
    for ax in (axes[0, 0], axes[1, 1]):
        ax.set_yscale("log", nonpositive="mask")
    for ax in (axes[0, 1], axes[1, 0]):
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    for ax in axes[1]:
        ax.set_xlabel("step")
    figure.legend(*axes[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description="Train on modular addition with optax's loss and with sxe's, and compare."
    )
    parser.add_argument("--modulus", type=int, default=113)
    parser.add_argument("--train-share", type=float, default=0.6, help="share of all pairs")
    parser.add_argument("--width", type=int, default=200, help="size of both hidden layers")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--log-every", type=int, default=100, help="number of steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-18, help="Adam's; optax's default is 1e-8")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="collapse.png", help="where to write the figure")
    parser.add_argument("--smoke", action="store_true", help="train a tiny network, in seconds")
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()
    if not 0 < args.train_share < 1:
        parser.error(f"--train-share: expected a number between 0 and 1, got {args.train_share}")

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
