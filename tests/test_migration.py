"""What the README says to write instead of optax's losses and PyTorch's F.cross_entropy."""

import jax
import numpy as np
import optax
import pytest
from oracle import assert_close

import sxe

ROWS, K = 6, 5


def arrays():
    """Logits, labels, probabilities and class weights, from sines: the same in every library."""
    i = np.arange(ROWS * K).reshape(ROWS, K)
    logits = (4 * np.sin(3.7 * i + 1)).astype(np.float32)
    labels = np.arange(ROWS) ** 2 % K
    labels[4] = -100
    p = 1 + np.sin(2.3 * i)
    p = (p / p.sum(-1, keepdims=True)).astype(np.float32)
    return logits, labels, p, (1.5 + np.sin(np.arange(K))).astype(np.float32)


# The name of a call, whether it has dense targets, and its arguments for PyTorch and for sxe.
CALLS = {
    "defaults": (False, {}, {"ignore_index": -100}),
    "sum": (False, {"reduction": "sum"}, {"ignore_index": -100, "reduction": "sum"}),
    "weight": (False, {"weight": "c"}, {"ignore_index": -100, "class_weights": "c"}),
    "label_smoothing": (
        False,
        {"weight": "c", "label_smoothing": 0.2},
        {"ignore_index": -100, "class_weights": "c", "label_smoothing": 0.2},
    ),
    "ignore_index": (False, {"ignore_index": 1}, {"ignore_index": 1}),
    "probabilities": (True, {}, {}),
    "probabilities, weight, smoothing": (
        True,
        {"weight": "c", "label_smoothing": 0.2},
        {"class_weights": "c", "label_smoothing": 0.2},
    ),
}

# (loss, gradient[0, 0], sum of |gradient|) of torch 2.13.0+cpu: python tests/test_migration.py
TORCH = {
    "defaults": (3.6388856188687853, -0.10403864653166613, 1.573820725351946),
    "sum": (18.194428094343927, -0.5201932326583306, 7.869103626759729),
    "weight": (4.669264495549964, -0.11428019439204436, 1.661278951919051),
    "label_smoothing": (4.7847630007583355, -0.0759395361122618, 1.5090038738121265),
    "ignore_index": (3.1930957508923647, -0.10403864653166613, 1.572603770091227),
    "probabilities": (4.417137299043486, 0.049955849360119334, 1.3525197223016612),
    "probabilities, weight, smoothing": (
        7.632989106101611,
        0.08646111241975266,
        2.1907040900908674,
    ),
}


def call(name):
    """logits, targets and the two sets of arguments of that call."""
    dense, theirs, ours = CALLS[name]
    logits, labels, p, c = arrays()
    if name == "ignore_index":
        labels = np.maximum(labels, 0)
    theirs, ours = ({k: c if v == "c" else v for k, v in kw.items()} for kw in (theirs, ours))
    return logits, p if dense else labels, theirs, ours


def torch_result(name):
    import torch

    logits, targets, kwargs, _ = call(name)
    kwargs = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(targets)
    if targets.is_floating_point():
        targets = targets.double()
    kwargs = {k: v.double() if k == "weight" else v for k, v in kwargs.items()}
    loss = torch.nn.functional.cross_entropy(x, targets, **kwargs)
    (d,) = torch.autograd.grad(loss, x)
    return loss.item(), d[0, 0].item(), d.abs().sum().item()


@pytest.mark.parametrize("name", CALLS)
def test_torch(name):
    logits, targets, _, ours = call(name)
    loss, gradient = jax.value_and_grad(sxe.softmax_cross_entropy)(logits, targets, **ours)
    got = (loss, gradient[0, 0], abs(gradient).sum())
    np.testing.assert_allclose(np.asarray(got), TORCH[name], rtol=2e-6)


@pytest.mark.parametrize("name", CALLS)
def test_stored_torch_values(name):
    pytest.importorskip("torch", reason="PyTorch is not a dependency of the tests")
    np.testing.assert_allclose(torch_result(name), TORCH[name], rtol=1e-12)


def test_optax_integer_labels():
    logits, labels, _, _ = arrays()
    labels = np.maximum(labels, 0)
    theirs = optax.softmax_cross_entropy_with_integer_labels
    ours = sxe.softmax_cross_entropy(logits, labels, reduction="none")
    assert_close(ours, np.asarray(theirs(logits, labels), np.float64))
    ours = jax.grad(sxe.softmax_cross_entropy)(logits, labels)
    assert_close(ours, jax.grad(lambda x: theirs(x, labels).mean())(logits))


def test_optax_dense_targets():
    logits, _, p, _ = arrays()
    theirs = optax.softmax_cross_entropy
    ours = sxe.softmax_cross_entropy(logits, p, reduction="none")
    assert_close(ours, np.asarray(theirs(logits, p), np.float64))
    ours = jax.grad(sxe.softmax_cross_entropy, argnums=(0, 1))(logits, p)
    theirs = jax.grad(lambda x, t: theirs(x, t).mean(), argnums=(0, 1))(logits, p)
    jax.tree.map(assert_close, ours, theirs)


def test_optax_where():
    logits, labels, _, _ = arrays()
    labels = np.maximum(labels, 0)
    mask = logits < 3.5
    mask[np.arange(ROWS), labels] = True
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, labels, where=mask)
    ours = sxe.softmax_cross_entropy(logits, labels, where=mask, reduction="none")
    assert_close(ours, np.asarray(theirs, np.float64))


if __name__ == "__main__":
    for name in CALLS:
        print(f"    {name!r}: {torch_result(name)},")
