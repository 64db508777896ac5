"""PyTorch's cross-entropy calls and a training loop, next to their ports to JAX with sxe.

    python examples/port_from_torch.py

The script runs both sides on the same arrays. It prints both losses and the largest differences of
the loss and of its gradients, and fails if a difference is larger than rounding errors. If PyTorch
is not installed, it compares with stored results of PyTorch at the end of this file; --store prints
them. sxe/docs/migration.md lists all arguments of the functions of PyTorch and of other libraries.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sxe

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

N, K, D, STEPS = 32, 10, 16, 20
TOLERANCE = 1e-5  # relative to the largest element; the two libraries round differently


def waves(*shape):
    """Numbers that are the same in every library and on every machine."""
    return (2 * np.sin(1 + np.arange(np.prod(shape)) ** 1.3)).reshape(shape).astype(np.float32)


logits = waves(N, K)
labels = np.arange(N) ** 2 % K
padded = np.where(np.arange(N) % 5 == 0, -100, labels)  # -100 marks rows that do not count
class_weights = 1.5 + waves(K) / 2
probabilities = np.exp(waves(N, K)[::-1])
probabilities /= probabilities.sum(axis=1, keepdims=True)
images = waves(2, K, 6, 4)  # logits of a segmentation, with the classes on axis 1
masks = np.arange(2 * 6 * 4).reshape(2, 6, 4) % K
hidden, weight, bias = waves(N, D), waves(K, D) / 4, waves(K)  # of a torch.nn.Linear(D, K)


def pairs():
    """For each title: the arrays that get gradients, PyTorch's call, and sxe's call."""
    t = None if torch is None else torch.from_numpy
    return {
        "labels, some of them -100": (
            (logits,),
            lambda x: F.cross_entropy(x, t(padded)),
            lambda x: sxe.softmax_cross_entropy(x, padded, ignore_index=-100),
        ),
        "another ignore_index": (
            (logits,),
            lambda x: F.cross_entropy(x, t(labels), ignore_index=0),
            lambda x: sxe.softmax_cross_entropy(x, labels, ignore_index=0),
        ),
        "class weights": (
            (logits,),
            lambda x: F.cross_entropy(x, t(padded), weight=t(class_weights)),
            lambda x: sxe.softmax_cross_entropy(
                x, padded, ignore_index=-100, class_weights=class_weights
            ),
        ),
        "label smoothing": (
            (logits,),
            lambda x: F.cross_entropy(x, t(padded), label_smoothing=0.1),
            lambda x: sxe.softmax_cross_entropy(x, padded, ignore_index=-100, label_smoothing=0.1),
        ),
        "probabilities": (
            (logits,),
            lambda x: F.cross_entropy(x, t(probabilities)),
            lambda x: sxe.softmax_cross_entropy(x, probabilities),
        ),
        "sum": (
            (logits,),
            lambda x: F.cross_entropy(x, t(padded), reduction="sum"),
            lambda x: sxe.softmax_cross_entropy(x, padded, ignore_index=-100, reduction="sum"),
        ),
        "segmentation, class axis 1": (
            (images,),
            lambda x: F.cross_entropy(x, t(masks)),
            lambda x: sxe.softmax_cross_entropy(x, masks, ignore_index=-100, axis=1),
        ),
        "linear head": (  # PyTorch has F.linear_cross_entropy since version 2.13
            (hidden, weight, bias),
            lambda h, w, b: F.cross_entropy(F.linear(h, w, b), t(padded)),
            lambda h, w, b: sxe.linear_softmax_cross_entropy(
                h, w.T, padded, bias=b, ignore_index=-100
            ),
        ),
        f"{STEPS} steps of SGD": ((), train_torch, train_sxe),
    }


def train_torch():
    model = torch.nn.Linear(D, K)
    model.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, targets = torch.tensor(hidden), torch.tensor(padded)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
    return loss


def train_sxe():
    params = {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}
    optimizer = optax.sgd(0.1, momentum=0.9)
    opt_state = optimizer.init(params)

    def loss_fn(params, inputs, targets):
        return sxe.linear_softmax_cross_entropy(
            inputs,
            params["kernel"],
            targets,
            bias=params["bias"],
            ignore_index=-100,
            label_smoothing=0.1,
        )

    @jax.jit
    def step(params, opt_state, inputs, targets):
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, targets)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    for _ in range(STEPS):
        params, opt_state, loss = step(params, opt_state, hidden, padded)
    return loss


def torch_result(arrays, call):
    """PyTorch's [loss, gradient, ...]."""
    inputs = [torch.tensor(a, requires_grad=True) for a in arrays]
    loss = call(*inputs)
    gradients = torch.autograd.grad(loss, inputs) if inputs else ()
    return [np.asarray(r.detach()) for r in (loss, *gradients)]


def sxe_result(arrays, call):
    """sxe's [loss, gradient, ...]."""
    if not arrays:
        return [np.asarray(call())]
    loss, gradients = jax.jit(jax.value_and_grad(call, argnums=tuple(range(len(arrays)))))(*arrays)
    return [np.asarray(r) for r in (loss, *gradients)]


def summary(result):
    """The stored form of a result: the loss, and a sum of each gradient with unequal weights."""
    return [float((r * np.cos(np.arange(r.size)).reshape(r.shape)).sum()) for r in result]


def difference(theirs, ours):
    """The largest difference as a fraction of the largest element."""
    return np.max(np.abs(theirs - ours)) / np.max(np.abs(ours))


def print_to_store():
    print(f'STORED_BY = "torch {torch.__version__}"\nSTORED = {{')
    for title, (arrays, call, _) in pairs().items():
        values = ", ".join(f"{value:.8g}" for value in summary(torch_result(arrays, call)))
        print(f'    "{title}": [{values}],')
    print("}")


def compare():
    """Print a line for each pair, and return the largest relative difference."""
    print(f"{'':26}  {'PyTorch':>9}  {'sxe':>9}  {'loss differs':>12}  {'gradients differ':>16}")
    differences = []
    for title, (arrays, torch_call, sxe_call) in pairs().items():
        ours = sxe_result(arrays, sxe_call)
        if torch is None:
            theirs, ours = STORED[title], summary(ours)
        else:
            theirs = torch_result(arrays, torch_call)
        loss, *gradients = map(difference, theirs, ours)
        shown = f"{max(gradients):.1e}" if gradients else ""
        row = f"{title:26}  {theirs[0]:9.6f}  {ours[0]:9.6f}  {loss:12.1e}  {shown:>16}"
        print(row.rstrip())
        differences += [loss, *gradients]
    return np.max(differences)  # NaN if one is


def main():
    parser = argparse.ArgumentParser(description="PyTorch's cross-entropy and its port to sxe.")
    parser.add_argument("--store", action="store_true", help="print PyTorch's results to store")
    args = parser.parse_args()
    if args.store:
        if torch is None:
            sys.exit("--store needs PyTorch: pip install torch")
        return print_to_store()

    if torch is None:
        print(f"PyTorch is not installed: comparing with stored results of {STORED_BY},")
        print("the loss and a sum over each gradient. Install torch to compare all elements.")
    else:
        print(f"torch {torch.__version__} and sxe on jax {jax.__version__}, element by element")
    largest = compare()
    print(f"largest relative difference: {largest:.1e}")
    if not largest < TOLERANCE:
        sys.exit(f"the largest difference exceeds the tolerance, {TOLERANCE:.0e}")


# python examples/port_from_torch.py --store
STORED_BY = "torch 2.13.0+cpu"
STORED = {
    "labels, some of them -100": [2.9240284, 0.24336985],
    "another ignore_index": [2.7855337, 0.2637385],
    "class weights": [2.8997614, 0.24526141],
    "label smoothing": [2.930727, 0.21434036],
    "probabilities": [3.0689962, 0.019853306],
    "sum": [73.100708, 6.0842465],
    "segmentation, class axis 1": [3.1351259, -0.041303662],
    "linear head": [5.1307998, -0.28164835, -0.85343511, 0.18411919],
    "20 steps of SGD": [1.2198825],
}


if __name__ == "__main__":
    main()
