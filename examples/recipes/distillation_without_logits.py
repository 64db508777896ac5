"""Knowledge distillation from a teacher's hidden states and kernel, without logits on either side.

    q = softmax(hidden @ kernel / T)    p = softmax(teacher_hidden @ teacher_kernel / T)
    loss = T^2 KL(p || q), T^2 KL(q || p), or T^2 times the Jensen-Shannon divergence between them

The plain implementation computes the logits of the teacher and of the student for all tokens, two
arrays [N, K]. `linear_kl_divergence` computes both for one chunk of rows at a time. Teacher and
student have the same classes, but may have different hidden sizes. For a teacher that is not
trained, the only matrix product is the one that computes its logits. If only the largest logits of
the teacher are stored, see top_k_distillation.py. If the teacher's probabilities are stored, see
distillation.py. To run this script:

    python examples/recipes/distillation_without_logits.py
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

import sxe

N, K = 512, 200  # tokens, classes
D, D_TEACHER = 32, 96  # hidden sizes
TEMPERATURE = 2.0
# "forward": the student learns to cover everything that the teacher may say. "reverse": it learns
# to say only what the teacher would say. "jensen_shannon" lies between the two, and is bounded.
MODES = ("forward", "reverse", "jensen_shannon")


def hidden_fn(params, x):
    """A stand-in for a model, either the student or the teacher."""
    return jnp.tanh(x @ params["layer"])


def loss_fn(hidden, kernel, teacher_hidden, teacher_kernel, where, mode):
    """`where` is False for padding."""
    divergence = sxe.linear_kl_divergence(
        hidden,
        kernel,
        teacher_hidden,
        teacher_kernel,
        mode=mode,
        logit_scale=1 / TEMPERATURE,
        target_logit_scale=1 / TEMPERATURE,
        where=where,
    )
    return TEMPERATURE**2 * divergence


def logits_loss_fn(hidden, kernel, teacher_hidden, teacher_kernel, where, mode):
    """The plain implementation, from the log-probabilities of all classes."""
    logits, teacher_logits = hidden @ kernel, teacher_hidden @ teacher_kernel
    log_q, log_p = (
        jax.nn.log_softmax(x.astype(jnp.float32) / TEMPERATURE) for x in (logits, teacher_logits)
    )
    kl = optax.losses.kl_divergence_with_log_targets  # KL(p || q) is kl(log_q, log_p)
    if mode == "forward":
        divergences = kl(log_q, log_p)
    elif mode == "reverse":
        divergences = kl(log_p, log_q)
    else:
        log_m = jnp.logaddexp(log_p, log_q) - math.log(2)
        divergences = (kl(log_m, log_p) + kl(log_m, log_q)) / 2
    return TEMPERATURE**2 * jnp.mean(divergences, where=where)


def model_loss_fn(params, teacher, x, where, mode, loss_fn=loss_fn):
    student = hidden_fn(params, x), params["kernel"]
    return loss_fn(*student, hidden_fn(teacher, x), teacher["kernel"], where, mode)


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def make_model(key, size):
    layer, kernel = jax.random.split(key)
    return {
        "layer": jax.random.normal(layer, (D, size)) / D**0.5,
        "kernel": 4 * jax.random.normal(kernel, (size, K)) / size**0.5,
    }


def train(params, teacher, x, where):
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(model_loss_fn)(params, teacher, x, where, "forward")
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def report(when):
        student, best = (
            jnp.argmax(hidden_fn(model, x) @ model["kernel"], axis=-1)
            for model in (params, teacher)
        )
        agree = jnp.mean(student == best, where=where)
        print(f"student and teacher agree on {agree:.0%} of the rows {when}")

    report("before training")
    for _ in range(200):
        params, opt_state = step(params, opt_state)
    report("after 200 steps")


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    x, where = jax.random.normal(keys[0], (N, D)), jnp.arange(N) % 8 != 7
    teacher, params = make_model(keys[1], D_TEACHER), make_model(keys[2], D)
    batch = teacher, x, where

    for mode in MODES:
        found, expected = (
            jax.jit(jax.value_and_grad(functools.partial(model_loss_fn, mode=mode, loss_fn=f)))(
                params, *batch
            )
            for f in (loss_fn, logits_loss_fn)
        )
        error = difference(found, expected)
        print(f"{mode}: loss and gradients, largest difference from logits {error:.1e}")
    train(params, *batch)

    # Compile, but do not run, last layers of the size that language models have.
    shapes = (1024, 512), (512, 32_000), (1024, 1024), (1024, 32_000)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    temporaries = [
        jax.jit(jax.value_and_grad(functools.partial(f, mode="forward"), argnums=(0, 1)))
        .lower(*arrays, where=jax.ShapeDtypeStruct((1024,), bool))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (loss_fn, logits_loss_fn)
    ]
    head, logits = (f"{size / 2**20:,.0f} MiB" for size in temporaries)
    print(f"temporaries: {head} with the head, {logits} with logits")


if __name__ == "__main__":
    main()
