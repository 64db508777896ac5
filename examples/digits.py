"""Train a small convolutional network on scikit-learn's handwritten digits with sxe and optax.

One jitted step computes the loss, its closed-form gradient and the optimizer's update. At the end
the script prints the accuracy and compares the closed-form gradient of the trained model with
autodiff and with NumPy in float64. It draws the loss curves and the misread held-out digits:

    python examples/digits.py --figure digits.png
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import sxe


def init_params(key):
    """Two 3 x 3 convolutions, and a dense layer from a 4 x 4 image onto the ten classes."""
    shapes = {"conv1": (3, 3, 1, 16), "conv2": (3, 3, 16, 32), "dense": (4 * 4 * 32, 10)}
    he_normal = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"kernel": he_normal(k, shape), "bias": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def apply(params, images):
    """The logits [N, 10] of images [N, 8, 8]."""
    x = images[..., None]
    for layer in (params["conv1"], params["conv2"]):
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"])
    x = x.reshape(len(x), 4, 2, 4, 2, -1).max(axis=(2, 4))  # 2 x 2 max pool
    return x.reshape(len(x), -1) @ params["dense"]["kernel"] + params["dense"]["bias"]


def loss_fn(params, images, labels):
    return sxe.softmax_cross_entropy(apply(params, images), labels, return_metrics=True)


evaluate = jax.jit(loss_fn)


def train(args, params, train_set, test_set):
    """Train, and return the parameters and the (train, held-out) loss of every epoch."""
    images, labels = train_set
    steps = len(labels) // args.batch_size  # the last partial batch of each shuffle is left out
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.epochs * steps)
    optimizer = optax.adamw(schedule)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, images, labels):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(args.seed)
    history = []
    progress = tqdm(range(args.epochs), desc="training", unit="epoch")
    for _ in progress:
        losses = []
        order = rng.permutation(len(labels))[: steps * args.batch_size]
        for i in order.reshape(steps, args.batch_size):
            params, opt_state, loss = step(params, opt_state, images[i], labels[i])
            losses.append(loss)  # stays on the device: reading it here would stall the loop
        history.append((np.mean(losses), float(evaluate(params, *test_set)[0])))
        progress.set_postfix_str("loss {:.4f}, held-out {:.4f}".format(*history[-1]), refresh=False)
    return params, np.array(history)


def check_gradient(logits, labels):
    """Print how far the closed-form gradient is from autodiff and from float64 NumPy."""

    def gradient(rule):
        loss = functools.partial(sxe.softmax_cross_entropy, labels=labels, rule=rule)
        return np.asarray(jax.jit(jax.grad(loss))(logits), np.float64)

    x = np.asarray(logits, np.float64)
    q = np.exp(x - x.max(axis=1, keepdims=True))
    q /= q.sum(axis=1, keepdims=True)
    # This is (q - y) / N, with q_y - 1 computed as minus the sum of the other q. In confident rows
    # q_y is so close to 1 that q_y - 1 would lose most of its digits, even in float64.
    rows = np.arange(len(labels))
    q[rows, labels] = 0
    q[rows, labels] = -q.sum(axis=1)
    exact = q / len(labels)

    closed_form = gradient("vjp")
    n, k = logits.shape
    print(f"closed-form gradient for the {n} x {k} train logits, {logits.dtype}, largest error")
    for name, reference in (("autodiff", gradient("autodiff")), ("float64 NumPy", exact)):
        error = np.abs(closed_form - reference)
        relative = np.max(error / np.maximum(np.abs(exact), 1e-37))
        print(f"  against {name:13}  {error.max():.1e} absolute, {relative:.1e} relative")


def draw(history, images, labels, predictions, path):
    """Draw the losses of every epoch (left) and at most 36 misread held-out digits (right)."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    ax = left.subplots()
    for name, losses in zip(("train", "held-out"), history.T, strict=True):
        ax.semilogy(np.arange(1, len(losses) + 1), losses, marker=".", label=name)
    ax.set(title="Loss", xlabel="epoch", ylabel="mean cross-entropy (nats)")
    ax.grid(alpha=0.3)
    ax.legend()

    wrong = np.flatnonzero(predictions != labels)
    right.suptitle(f"{len(wrong)} of {len(labels)} held-out digits misread")
    side = max(1, min(6, math.ceil(math.sqrt(len(wrong)))))
    for place, i in enumerate(wrong[: side**2], start=1):
        ax = right.add_subplot(side, side, place, xticks=[], yticks=[])
        ax.imshow(images[i], cmap="gray_r")
        ax.set_title(f"{labels[i]} read as {predictions[i]}", fontsize="small")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description="Train a digit classifier with sxe and optax.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="digits.png", help="where to write the figure")
    args = parser.parse_args()

    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    split = {"test_size": 0.25, "stratify": labels, "random_state": args.seed}
    train_x, test_x, train_y, test_y = train_test_split(images, labels, **split)
    train_set, test_set = (train_x, train_y), (test_x, test_y)

    params, history = train(args, init_params(jax.random.key(args.seed)), train_set, test_set)
    for name, (images, labels) in (("train", train_set), ("held-out", test_set)):
        loss, metrics = evaluate(params, images, labels)
        predictions = np.asarray(metrics.predictions)
        accuracy = np.mean(predictions == labels)
        print(f"{name:8}  accuracy {accuracy:.2%} of {len(labels)} digits, loss {loss:.4f}")
    draw(history, *test_set, predictions, args.figure)
    check_gradient(jax.jit(apply)(params, train_x), train_y)
    print(f"loss curves and misread digits: {args.figure}")


if __name__ == "__main__":
    main()
