"""Group relative policy optimization (GRPO, DeepSeekMath, arXiv 2402.03300) without logits.

A policy samples a group of answers to each prompt. Each answer has a reward, and its advantage A is
how far the reward is above the mean of the group, in standard deviations. For a token with
log-probability log p, which was log p_old when it was sampled, and H the entropy of the policy,

    ratio     = p / p_old
    objective = min(ratio A, clip(ratio, 1 - e, 1 + e) A) - beta k3(log p_ref - log p) + c H
    loss      = -mean over answers of the mean over their tokens of the objective

k3(d) = exp(d) - 1 - d estimates the divergence KL(p || p_ref) from a frozen reference by the
sampled token. The entropy bonus, c H, is no part of the paper. One call of the head gives log p and
H of all tokens, both with gradients; `where` leaves out prompts and padding. To run it:

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
T, D, K = 16, 32, 300  # tokens, features, classes
LENGTH = 4  # of a prompt
END = 0  # the token that ends an answer
TEMPERATURE = 0.8  # of the samples
CLIP, BETA, ENTROPY = 0.2, 0.04, 1e-3  # e, beta and c
ROLLOUTS, STEPS = 15, 4  # steps on the answers of each rollout


class Batch(NamedTuple):
    """Answers, and what does not change while they are trained on. Labels are the next tokens."""

    tokens: jax.Array  # [B, T]
    labels: jax.Array  # [B, T]
    where: jax.Array  # [B, T], whether a label is the answer's: see supervised_fine_tuning.py
    advantages: jax.Array  # [B]
    old: jax.Array  # [B, T], log p of the policy that sampled
    reference: jax.Array  # [B, T], log p_ref


def hidden_fn(params, tokens):
    """Stands for a language model: [B, T] to [B, T, D], from the mean of the tokens so far."""
    count = jnp.arange(1, 1 + tokens.shape[1])[:, None]
    x = jnp.cumsum(params["embedding"][tokens], axis=1) / count
    return jnp.tanh(x @ params["layer"])


def policy(params, tokens, labels, where):
    """log p of the labels and the entropy, [B, T] each, and 0 where a label does not count.

    Tokens are sampled from softmax(logits / temperature), so that is the policy: a log-probability
    or an entropy at another temperature is that of a policy that nobody sampled from.
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

    It is about d^2 / 2 for a policy close to its reference, where exp(d) and 1 + d agree in nearly
    all of their digits, and expm1(d) and d in half of them. What is left is the error of d, which
    is what rounding leaves of two log-probabilities: 5e-7 in float32.
    """
    near = abs(d) < 0.5
    small = jnp.where(near, d, 0)  # so that the branch that is not taken stays finite
    series = jnp.zeros_like(d)
    for n in range(10, 1, -1):
        series = series * small + 1 / math.factorial(n)
    return jnp.where(near, small**2 * series, jnp.expm1(d) - d)


def k3_as_written(d):
    return jnp.exp(d) - 1 - d


def loss_fn(params, batch, policy=policy, k3=k3):
    log_prob, entropy = policy(params, batch.tokens, batch.labels, batch.where)
    # Where a label does not count, all of these log-probabilities are 0, and nothing overflows.
    ratio, advantages = jnp.exp(log_prob - batch.old), batch.advantages[:, None]
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    objective += ENTROPY * entropy - BETA * k3(batch.reference - log_prob)
    # Each answer has at least one token.
    means = jnp.sum(objective * batch.where, axis=-1) / jnp.sum(batch.where, axis=-1)
    return -jnp.mean(means)


def group_advantages(rewards):
    """[PROMPTS * GROUP]: none depends on how hard a prompt is, and no model of rewards is needed.

    A group whose rewards are all equal has advantages of 0, by the small number that is added.
    """
    rewards = rewards.reshape(PROMPTS, GROUP)
    above = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    return (above / (jnp.std(rewards, axis=1, keepdims=True) + 1e-4)).reshape(-1)


def reward_fn(tokens, of_answer):
    """Stands for what checks an answer: the share of its tokens that are even, [B]."""
    return jnp.mean(tokens % 2 == 0, axis=-1, where=of_answer)


@jax.jit
def rollout(params, reference, prompts, key):
    """A batch of answers to the prompts [PROMPTS, LENGTH], and their rewards [B]."""
    tokens = jnp.zeros((B, T + 1), int).at[:, :LENGTH].set(jnp.repeat(prompts, GROUP, axis=0))

    def add_token(t, tokens):  # logits of one position are small
        logits = hidden_fn(params, tokens)[:, t - 1] @ params["embedding"].T
        sampled = jax.random.categorical(jax.random.fold_in(key, t), logits / TEMPERATURE)
        return tokens.at[:, t].set(sampled)

    tokens = jax.lax.fori_loop(LENGTH, T + 1, add_token, tokens)
    at = jnp.arange(T + 1)
    ended = jnp.cumsum((tokens == END) & (at >= LENGTH), axis=1) - (tokens == END) > 0
    of_answer = (at >= LENGTH) & ~ended  # an answer's end is the last of its tokens
    rewards = reward_fn(tokens, of_answer)
    inputs = tokens[:, :-1], tokens[:, 1:], of_answer[:, 1:]
    old, ref = (policy(model, *inputs).log_prob for model in (params, reference))
    return Batch(*inputs, group_advantages(rewards), old, ref), rewards


def difference(tree, expected):
    """The largest difference, each relative to the largest magnitude of its array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def as_float64(tree):
    def wide(x):
        return np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

    return jax.tree.map(wide, tree)


def compare_with_logits(params, batch):
    """Loss and gradients beside those of logits in float64, and with k3 as it is written."""
    with jax.enable_x64(True):
        plain = functools.partial(loss_fn, policy=policy_from_logits, k3=k3_as_written)
        expected = jax.jit(jax.value_and_grad(plain))(*as_float64((params, batch)))
    found = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    error = difference(as_float64(found), as_float64(expected))
    print(f"loss and gradients: largest difference from logits in float64 {error:.1e}")


def compare_estimates(params, reference, batch):
    """k3 of the sampled tokens, in three ways, beside float64; and beside what it estimates."""
    log_prob = policy(params, batch.tokens, batch.labels, batch.where).log_prob
    d = (batch.reference - log_prob)[batch.where]
    estimate = jnp.mean(k3(d))
    d = d[abs(d) > 1e-5]  # what is closer is a rounding of the log-probabilities
    exact = np.asarray(d, np.float64)
    true = np.expm1(exact) - exact
    print(f"log p_ref - log p: {np.median(abs(d)):.0e} in the median")

    def worst(estimates):
        return np.max(abs(np.float64(estimates) - true) / true)

    print(f"exp(d) - 1 - d: off by up to {worst(k3_as_written(d)):.2%}")
    print(f"expm1(d) - d: off by up to {worst(jnp.expm1(d) - d):.2%}")
    print(f"k3: largest difference from float64 {worst(k3(d)):.1e}")
    # The divergence itself, over all classes, takes the hidden states of the reference as well.
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
    print(f"mean of k3: {estimate / divergence:.2f} of the divergence, {divergence:.1e}")


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

    # One small step from the reference, where the divergence is smallest. The answers are new ones:
    # by those that the step was taken on, a policy seems farther away than it is.
    batch, _ = rollout(reference, reference, prompts, keys[4])
    grads = jax.grad(loss_fn)(reference, batch)
    nearby = jax.tree.map(lambda x, g: x - 0.05 * g, reference, grads)
    batch, _ = rollout(nearby, reference, prompts, keys[5])
    compare_estimates(nearby, reference, batch)


if __name__ == "__main__":
    main()
