"""Train softmax regression on scikit-learn's handwritten digits by Newton's method, with sxe.

With the gradient g and the Hessian H, a step solves H d = -g for the direction d by conjugate
gradients. JAX computes the Hessian-vector products by differentiating sxe's closed-form gradient. A
line search compares slopes, the derivatives of the loss along d. Adam and L-BFGS get the same
number of passes over the data; a gradient, a product and a slope each count as one pass. For each
method, the script takes the best setting of a small grid. At the end it compares the Hessian with
its closed form, and draws the loss curves and the digits with the largest gradients:

    python examples/second_order.py --figure second_order.png
"""

import argparse
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import sxe


def apply(params, images):
    return images @ params["kernel"] + params["bias"]


def loss_fn(params, images, labels, l2, rule="vjp"):
    loss = sxe.softmax_cross_entropy(apply(params, images), labels, rule=rule)
    return loss + l2 / 2 * optax.tree.vdot(params, params)


# Each method returns a function that generates, after each step, (parameters, passes so far).


def newton(args, images, labels, tolerance):
    """Newton-CG. The norm of the residual of H d = -g is at most `tolerance` times that of g."""
    products = []

    @jax.jit
    def step(params, images, labels):
        loss = functools.partial(loss_fn, images=images, labels=labels, l2=args.l2)
        # The default rule supports derivatives whose first one is in reverse mode, as here. With
        # jax.linearize, a product costs as much as a gradient; with jax.jvp, 1.5 times as much.
        g, product = jax.linearize(jax.grad(loss), params)

        def counted(v):
            jax.debug.callback(lambda: products.append(1))  # cg does not return a count
            return product(v)

        d, _ = cg(counted, optax.tree.scale(-1, g), tol=tolerance)

        def slope(t):  # d loss(params + t d) / dt; forward mode alone needs rule="jvp"
            at = optax.tree.add_scale(params, t, d)
            return jax.jvp(functools.partial(loss, rule="jvp"), (at,), (d,))[1]

        # Halve the step while the slope at its end is larger than half of -slope at its start. Do
        # not compare losses: near the optimum they are all equal in float32, but slopes differ.
        steep, one = -optax.tree.vdot(g, d) / 2, jnp.ones((), images.dtype)
        t, _, trials = jax.lax.while_loop(
            lambda search: (search[1] > steep) & (search[2] < 10),
            lambda search: (search[0] / 2, slope(search[0] / 2), search[2] + 1),
            (one, slope(one), 1),
        )
        return optax.tree.add_scale(params, t, d), trials

    def steps(params):
        passes = 0
        while True:
            products.clear()
            params, trials = step(params, images, labels)
            jax.effects_barrier()  # wait until all products are counted
            passes += 1 + len(products) + int(trials)
            yield params, passes

    return steps


def lbfgs(args, images, labels, memory_size):
    optimizer = optax.lbfgs(memory_size=memory_size)

    @jax.jit
    def step(params, state, images, labels):
        loss = functools.partial(loss_fn, images=images, labels=labels, l2=args.l2)
        value, grads = optax.value_and_grad_from_state(loss)(params, state=state)
        of = {"value": value, "grad": grads, "value_fn": loss}  # for the line search
        updates, state = optimizer.update(grads, state, params, **of)
        return optax.apply_updates(params, updates), state

    def steps(params):
        state = optimizer.init(params)
        passes = 1  # the first gradient; later ones are in the state, from the line search
        while True:
            params, state = step(params, state, images, labels)
            passes += int(state[-1].info.num_linesearch_steps)
            yield params, passes

    return steps


def adam(args, images, labels, batch_size, learning_rate):
    """Adam, with a learning rate that decays to 0 over all passes."""
    batches = len(labels) // batch_size  # the last partial batch of each shuffle is left out
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, args.passes * batches))

    @jax.jit
    def epoch(params, state, images, labels, order):
        def step(carry, i):
            params, state = carry
            grads = jax.grad(loss_fn)(params, images[i], labels[i], args.l2)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    def steps(params):
        state = optimizer.init(params)
        rng = np.random.default_rng(args.seed)
        for passes in itertools.count(1):
            order = rng.permutation(len(labels))[: batches * batch_size].reshape(batches, -1)
            params, state = epoch(params, state, images, labels, order)
            yield params, passes

    return steps


def run(steps, params, passes):
    """The steps within the budget, and the seconds of two runs. Only the first run compiles."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        history = list(itertools.takewhile(lambda step: step[1] <= passes, steps(params)))
        jax.block_until_ready(history)
        seconds.append(time.perf_counter() - start)
    return history, seconds


def float64_loss(args, start, images, labels):
    """The loss as a function of float32 parameters, and the smallest loss, both in float64."""

    def wide(tree):
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)

    def loss(params):
        with jax.enable_x64(True):
            return float(jitted(wide(params), wide(images), labels, args.l2)[0])

    jitted = jax.jit(jax.value_and_grad(loss_fn))
    with jax.enable_x64(True):
        steps = newton(args, wide(images), labels, tolerance=1e-3)(wide(start))
        for params, _ in itertools.islice(steps, 50):
            smallest, g = jitted(params, wide(images), labels, args.l2)
            # The loss is l2-strongly convex, so this bounds its gap to the smallest loss.
            if optax.tree.vdot(g, g) / (2 * args.l2) < 1e-16:
                return loss, float(smallest)
    raise SystemExit(f"--l2 {args.l2}: too small to find the smallest loss in float64")


def check_hessian(args, params, images, labels, row):
    """Compare Hessians and a product with diag(q) - q q^T (line D4) of every row in float64."""
    x = np.asarray(apply(params, images), np.float64)
    q = np.exp(x - x.max(axis=1, keepdims=True))
    q /= q.sum(axis=1, keepdims=True)
    rows = q[:, :, None] * (np.eye(q.shape[1]) - q[:, None, :])
    inputs = np.insert(np.asarray(images, np.float64), 0, 1, axis=1)  # 1 for the bias
    exact = np.einsum("nkl,ni,nj->ikjl", rows, inputs, inputs, optimize=True) / len(x)
    flat, unravel = ravel_pytree(params)  # the bias first
    exact = exact.reshape(2 * flat.shape) + args.l2 * np.eye(len(flat))

    def loss(flat):
        return loss_fn(unravel(flat), images, labels, args.l2)

    v = jax.random.normal(jax.random.key(args.seed), flat.shape)
    checks = {
        f"of the logits of row {row}": (
            jax.hessian(sxe.softmax_cross_entropy)(apply(params, images[row]), labels[row]),
            rows[row],
        ),
        "of all parameters": (jax.jit(jax.hessian(loss))(flat), exact),
        "times a vector": (jax.jvp(jax.grad(loss), (flat,), (v,))[1], exact @ v),
    }
    low, *_, high = np.linalg.eigvalsh(exact)
    print(f"Hessian, {len(v)} x {len(v)}, eigenvalues {low:.1e} to {high:.1e}: largest error")
    for name, (got, expected) in checks.items():
        error = np.abs(got - expected).max() / np.abs(expected).max()
        print(f"  {name:27}{error:.1e} of the largest entry")


def draw(curves, images, labels, q, norms, path):
    """Draw the gaps to the smallest loss (left) and digits with the largest gradients (right)."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    ax = left.subplots()
    for name, (passes, gaps) in curves.items():
        ax.semilogy(passes, gaps, marker=".", markersize=4, linewidth=1, label=name)
    ax.set(title="Train loss above the smallest", xlabel="passes over the data", ylabel="nats")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower left")

    right.suptitle("Train digits with the largest gradients")
    axes = right.subplots(3, 5, subplot_kw={"xticks": [], "yticks": []})
    for ax, i in zip(axes.flat, np.argsort(-norms), strict=False):
        ax.imshow(images[i].reshape(8, 8), cmap="gray_r")
        ax.set_title(f"{labels[i]}: q = {q[i, labels[i]]:.2f}", fontsize="small")
        ax.set_xlabel(f"norm {norms[i]:.1f}", fontsize="small")
    figure.savefig(path, dpi=150)


def first(passes, gaps, bound):
    """The passes after which the gap is at most `bound`, or "-", as text."""
    return next((str(n) for n, gap in zip(passes, gaps, strict=True) if gap <= bound), "-")


def main():
    parser = argparse.ArgumentParser(description="Newton's method on digits, with sxe.")
    parser.add_argument("--passes", type=int, default=200, help="passes over the data per run")
    parser.add_argument("--l2", type=float, default=1e-4, help="weight of |params|^2 / 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="try one setting of each method")
    parser.add_argument("--figure", default="second_order.png", help="where to write the figure")
    args = parser.parse_args()
    if args.l2 <= 0:
        parser.error(f"--l2: expected a positive number, got {args.l2}")

    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    split = {"test_size": 0.25, "stratify": labels, "random_state": args.seed}
    images, test_images, labels, test_labels = train_test_split(images, labels, **split)
    # Put them on the device once: every step would copy NumPy arrays there.
    data = jnp.asarray(images), jnp.asarray(labels)
    start = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}

    few = slice(1 if args.smoke else None)
    adams = list(itertools.product((64, len(labels)), (0.1, 0.03, 0.3, 0.01)))
    runs = [("Newton-CG", newton, {"tolerance": t}) for t in (0.25, 0.1, 0.5)[few]]
    runs += [("L-BFGS", lbfgs, {"memory_size": m}) for m in (30, 10)[few]]
    runs += [("Adam", adam, {"batch_size": b, "learning_rate": r}) for b, r in adams[few]]

    loss, smallest = float64_loss(args, start, *data)
    best = {}  # by name, the run that ended closest to the smallest loss
    for name, method, setting in tqdm(runs, desc="training", unit="run"):
        history, seconds = run(method(args, *data, **setting), start, args.passes)
        if not history:
            parser.error(f"--passes: expected enough for a step of {name}, got {args.passes}")
        gap = loss(history[-1][0]) - smallest
        if name not in best or gap < best[name][0]:
            best[name] = gap, setting, history, seconds

    print(f"{len(labels)} train digits: the smallest loss, with l2 {args.l2:g}, is {smallest:.6f}")
    print(f"{'passes to a gap of':>55}  gap after            seconds")
    print(f"{'1e-3    1e-6':>55}{args.passes:11}  held-out   compiling   again")
    curves = {}
    for name, (gap, setting, history, seconds) in best.items():
        curves[name] = [n for _, n in history], [loss(params) - smallest for params, _ in history]
        reached = "".join(f"{first(*curves[name], bound):>8}" for bound in (1e-3, 1e-6))
        accuracy = np.mean(np.argmax(apply(history[-1][0], test_images), axis=1) == test_labels)
        title = ", ".join([name, *(f"{k.replace('_', ' ')} {v}" for k, v in setting.items())])
        times = f"{seconds[0]:12.2f}{seconds[1]:8.3f}"
        print(f"{title:39}{reached}{gap:11.1e}{accuracy:10.2%}{times}")

    params = best["Newton-CG"][2][-1][0]
    # The gradients of each digit's own loss, without the L2 term.
    grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0, 0, None))(params, *data, 0.0)
    norms = np.asarray(jax.vmap(optax.tree.norm)(grads))
    largest = np.argsort(-norms)
    half = 1 + np.searchsorted(np.cumsum(norms[largest]), norms.sum() / 2)
    print(f"half of the sum of all digits' gradient norms comes from {half} digits")
    check_hessian(args, params, *data, row=largest[0])
    q = np.asarray(jax.nn.softmax(apply(params, images)))
    draw(curves, images, labels, q, norms, args.figure)
    print(f"curves, and digits with the largest gradients: {args.figure}")


if __name__ == "__main__":
    main()
