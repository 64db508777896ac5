"""Group relative policy optimization (GRPO, DeepSeekMath, arXiv 2402.03300) without logits.

A policy samples a group of answers to each prompt, and each answer gets a reward. The advantage A
of an answer is its reward minus the mean reward of its group, divided by the standard deviation of
the group. The log-probability of a token is log p under the policy, log p_old under the policy that
sampled it, and log p_ref under a frozen reference. H is the entropy of the policy, and e, beta and
c are constants. The loss is

    ratio     = p / p_old
    objective = min(ratio A, clip(ratio, 1 - e, 1 + e) A) - beta k3(log p_ref - log p) + c H
    loss      = -mean over answers of the mean over their tokens of the objective

k3(d) = exp(d) - 1 - d estimates the divergence KL(p || p_ref), using only the log-probability of
the sampled token. The entropy bonus c H is not in the paper. One call of
`linear_log_prob_and_entropy` computes log p and H of all tokens, and both are differentiable.
`where` excludes prompts and padding. To run this script:

    python examples/recipes/grpo.py
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sxe

PROMPTS, GROUP = 8, 16  # prompts, and answers to each
B = PROMPTS * GROUP
T, D, K = 16, 32, 300  # tokens, hidden size, classes
LENGTH = 4  # tokens of a prompt
END = 0  # the token that ends an answer
TEMPERATURE = 0.8  # at which tokens are sampled
CLIP, BETA, ENTROPY = 0.2, 0.04, 1e-3  # e, beta and c
ROLLOUTS, STEPS = 15, 4  # rollouts, and training steps on the answers of each


class Batch(NamedTuple):
    """Answers, and the arrays that stay fixed while the policy trains on them."""

    tokens: jax.Array  # [B, T]
    labels: jax.Array  # [B, T], the next tokens
    where: jax.Array  # [B, T], whether a label is in the answer: see supervised_fine_tuning.py
    advantages: jax.Array  # [B]
    old: jax.Array  # [B, T], log p_old
    reference: jax.Array  # [B, T], log p_ref


def hidden_fn(params, tokens):
    """A stand-in for a language model: [B, T] to [B, T, D], from the mean of the tokens so far."""
    count = jnp.arange(1, 1 + tokens.shape[1])[:, None]
    x = jnp.cumsum(params["embedding"][tokens], axis=1) / count
    return jnp.tanh(x @ params["layer"])


def policy(params, tokens, labels, where):
    """log p of the labels, and the entropy, [B, T] each. Both are 0 where a label does not count.

    Tokens are sampled from softmax(logits / temperature), so this distribution is the policy.
    Log-probabilities and entropies at another temperature belong to another policy.
    """
    hidden, kernel = hidden_fn(params, tokens), params["embedding"].T
    return sxe.linear_log_prob_and_entropy(
        hidden, kernel, labels, logit_scale=1 / TEMPERATURE, where=where
    )


def policy_from_logits(params, tokens, labels, where):
    log_q = jax.nn.log_softmax(hidden_fn(params, tokens) @ params["embedding"].T / TEMPERATURE)
    log_prob = jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    return jnp.where(where, log_prob, 0), jnp.where(where, entropy, 0)


def k3(d):
    """exp(d) - 1 - d, from its series where |d| is below 1/2.

    If the policy is close to its reference, k3 is about d^2 / 2. Then exp(d) and 1 + d agree in
    nearly all digits, and expm1(d) and d in half of them, so the differences cancel. The series has
    no cancellation. Its error comes from d, which has the rounding errors of two log-probabilities:
    5e-7 in float32.
    """
    near = abs(d) < 0.5
    small = jnp.where(near, d, 0)  # keeps the branch that is not taken finite
    series = jnp.zeros_like(d)
    for n in range(10, 1, -1):
        series = series * small + 1 / math.factorial(n)
    return jnp.where(near, small**2 * series, jnp.expm1(d) - d)


def k3_as_written(d):
    return jnp.exp(d) - 1 - d


def loss_fn(params, batch, policy=policy, k3=k3):
    log_prob, entropy = policy(params, batch.tokens, batch.labels, batch.where)
    # All log-probabilities are 0 where a label does not count, so nothing overflows there.
    ratio, advantages = jnp.exp(log_prob - batch.old), batch.advantages[:, None]
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    objective += ENTROPY * entropy - BETA * k3(batch.reference - log_prob)
    # Each answer has at least one token.
    means = jnp.sum(objective * batch.where, axis=-1) / jnp.sum(batch.where, axis=-1)
    return -jnp.mean(means)


def group_advantages(rewards):
    """The advantages [PROMPTS * GROUP]: rewards, normalized within each group.

    They do not depend on how hard a prompt is, and need no model that predicts rewards. If all
    rewards of a group are equal, the small number in the denominator makes the advantages 0.
    """
    rewards = rewards.reshape(PROMPTS, GROUP)
    above = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    return (above / (jnp.std(rewards, axis=1, keepdims=True) + 1e-4)).reshape(-1)


def reward_fn(tokens, of_answer):
    """A stand-in for a check of the answers: the share of even tokens in each answer, [B]."""
    return jnp.mean(tokens % 2 == 0, axis=-1, where=of_answer)


@jax.jit
def rollout(params, reference, prompts, key):
    """A batch of sampled answers to the prompts [PROMPTS, LENGTH], and their rewards [B]."""
    tokens = jnp.zeros((B, T + 1), int).at[:, :LENGTH].set(jnp.repeat(prompts, GROUP, axis=0))

    def add_token(t, tokens):  # from logits: the array for one position is small
        logits = hidden_fn(params, tokens)[:, t - 1] @ params["embedding"].T
        sampled = jax.random.categorical(jax.random.fold_in(key, t), logits / TEMPERATURE)
        return tokens.at[:, t].set(sampled)

    tokens = jax.lax.fori_loop(LENGTH, T + 1, add_token, tokens)
    at = jnp.arange(T + 1)
    ended = jnp.cumsum((tokens == END) & (at >= LENGTH), axis=1) - (tokens == END) > 0
    of_answer = (at >= LENGTH) & ~ended  # END is the last token of an answer
    rewards = reward_fn(tokens, of_answer)
    inputs = tokens[:, :-1], tokens[:, 1:], of_answer[:, 1:]
    old, ref = (policy(model, *inputs).log_prob for model in (params, reference))
    return Batch(*inputs, group_advantages(rewards), old, ref), rewards


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def as_float64(tree):
    def wide(x):
        return np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

    return jax.tree.map(wide, tree)


def compare_with_logits(params, batch):
    """Compare loss and gradients with a loss of float64 logits, where k3 needs no series."""
    with jax.enable_x64(True):
        plain = functools.partial(loss_fn, policy=policy_from_logits, k3=k3_as_written)
        expected = jax.jit(jax.value_and_grad(plain))(*as_float64((params, batch)))
    found = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    error = difference(as_float64(found), as_float64(expected))
    print(f"loss and gradients: largest difference from logits in float64 {error:.1e}")


def compare_estimates(params, reference, batch):
    """Compare three ways to compute k3 with float64, and the mean of k3 with the divergence."""
    log_prob = policy(params, batch.tokens, batch.labels, batch.where).log_prob
    d = (batch.reference - log_prob)[batch.where]
    estimate = jnp.mean(k3(d))
    d = d[abs(d) > 1e-5]  # smaller differences are rounding errors of the log-probabilities
    exact = np.asarray(d, np.float64)
    true = np.expm1(exact) - exact
    print(f"median of |log p_ref - log p|: {np.median(abs(d)):.0e}")

    def worst(estimates):
        return np.max(abs(np.float64(estimates) - true) / true)

    print(f"exp(d) - 1 - d: off by up to {worst(k3_as_written(d)):.2%}")
    print(f"expm1(d) - d: off by up to {worst(jnp.expm1(d) - d):.2%}")
    print(f"k3: largest difference from float64 {worst(k3(d)):.1e}")
    # The divergence itself, over all classes, also needs the hidden states of the reference.
    divergence = sxe.linear_kl_divergence(
        hidden_fn(params, batch.tokens),
        params["embedding"].T,
        hidden_fn(reference, batch.tokens),
        reference["embedding"].T,
        mode="reverse",
        logit_scale=1 / TEMPERATURE,
        target_logit_scale=1 / TEMPERATURE,
        where=batch.where,
    )
    print(f"mean of k3: {estimate / divergence:.2f} times the divergence of {divergence:.1e}")


def main():
    keys = jax.random.split(jax.random.key(0), 6)
    reference = {
        "embedding": jax.random.normal(keys[0], (K, D)) / D**0.5,
        "layer": jax.random.normal(keys[1], (D, D)),
    }
    prompts = jax.random.randint(keys[2], (PROMPTS, LENGTH), 1, K)
    params, optimizer = reference, optax.adam(3e-3)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, batch), opt_state)
        return optax.apply_updates(params, updates), opt_state

    for i, key in enumerate(jax.random.split(keys[3], ROLLOUTS)):
        batch, rewards = rollout(params, reference, prompts, key)
        if i in (0, ROLLOUTS - 1):
            print(f"mean reward of rollout {i + 1}: {jnp.mean(rewards):.2f}")
        for _ in range(STEPS):
            params, opt_state = step(params, opt_state, batch)
    print(f"tokens that count: {jnp.mean(batch.where):.0%} of {B * T}")
    compare_with_logits(params, batch)

    # Take one small step from the reference, where the divergence is smallest, and compare the
    # estimates there. Sample new answers for this: on the answers of the step, the policy seems
    # farther from the reference than it is.
    batch, _ = rollout(reference, reference, prompts, keys[4])
    grads = jax.grad(loss_fn)(reference, batch)
    nearby = jax.tree.map(lambda x, g: x - 0.05 * g, reference, grads)
    batch, _ = rollout(nearby, reference, prompts, keys[5])
    compare_estimates(nearby, reference, batch)


if __name__ == "__main__":
    main()
