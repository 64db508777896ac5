"""Train a small transformer on the Python standard library's sources, with optax's loss and sxe's.

The vocabulary has 16,384 byte pairs, so the logits are large. optax's loss needs 128 MiB of logits
for the 2,048 tokens of a step, and as much for their gradient. sxe's head takes the hidden states
and the kernel of the last layer instead, and never stores the full logits. Both losses train the
same model on the same batches, each in its own process. At the end the script prints the loss,
speed and peak memory of both, generates some code with the model, and draws the loss curves:

    python examples/language_model.py --loss both --figure language_model.png

This command trains on an accelerator, in bfloat16, with a last layer of a usual size:

    python examples/language_model.py --dtype bfloat16 --classes 131072 --dim 1024 --heads 16

Two options measure a training step instead of training on text. `--measure speed` takes steps on
one batch of random tokens, and prints tokens per second, peak memory, and the losses of the first
and the last step. `--measure largest-batch` compiles the step for a few batch sizes, but does not
run it. It finds approximately the largest batch whose step fits on the device. For example:

    python examples/language_model.py --dtype bfloat16 --classes 131072 --dim 1024 --heads 16 \
        --batch-size 64 --steps 40 --measure speed
"""

import argparse
import math
import multiprocessing
import random
import re
import resource
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import sxe

# Directories that are not read: installed packages are not part of the standard library, tests are
# most of its code, and encodings and pydoc_data are tables and text.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}

MIB = 2**20

DIM = 128
# For models with a hidden size up to DIM. With this rate, a much wider model amplifies rounding
# differences, until the curves of two correct losses differ by tenths of a nat.
LEARNING_RATE = 4e-3

WARM_UP_STEPS = 3  # not included in the speed of --measure speed

# For the search for the largest batch.
MOST_COMPILES = 5
BATCH_MULTIPLE = 8
CLOSE_TO_LIMIT = 0.97  # the search ends when a step needs this share of the memory

# Takes seconds instead of minutes, with the full vocabulary.
SMOKE = {
    "steps": 8,
    "context": 128,
    "dim": 32,
    "layers": 1,
    "heads": 2,
    "text_bytes": 4_000_000,
    "held_out_files": 4,
}


def read_sources(text_bytes, held_out_files):
    """The sources of the standard library's modules: training texts, and a few held-out texts."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path.relative_to(library) for path in library.rglob("*.py"))
    files = [file for file in files if not SKIPPED.intersection(file.parts)]
    random.Random(0).shuffle(files)  # text_bytes would cut off the end of the sorted list
    texts = []
    for file in files:
        if text_bytes <= 0:
            break
        source = (library / file).read_bytes()
        text_bytes -= len(source)
        texts.append(source.decode("utf-8", errors="replace"))
    return texts[held_out_files:], texts[:held_out_files]


def train_tokenizer(texts, vocabulary):
    """Byte pairs, as in GPT-2. The alphabet is all bytes, so every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocabulary:
        size = sum(len(text.encode()) for text in texts)
        raise SystemExit(
            f"{len(texts)} files with {size:,} bytes give a vocabulary of {found:,} byte pairs, "
            f"expected {vocabulary:,}: raise --text-bytes or lower --vocabulary"
        )
    return tokenizer


def encode(tokenizer, texts):
    """The tokens of all texts, concatenated."""
    return np.concatenate([np.array(e.ids, np.int32) for e in tokenizer.encode_batch(texts)])


class Block(nnx.Module):
    """Attention and a perceptron, each with a norm before it and a residual connection."""

    def __init__(self, dim, heads, dtype, *, rngs):
        zeros = nnx.initializers.zeros  # each block starts as the identity: learns faster
        self.attention_norm = nnx.RMSNorm(dim, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads,
            dim,
            use_bias=False,
            decode=False,
            out_kernel_init=zeros,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = nnx.RMSNorm(dim, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """From tokens [B, T] to the hidden states [B, T, D] before the last layer.

    The weights are float32. The matrix products are computed in `dtype`.
    """

    def __init__(self, args, *, classes=None, dtype=None, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        small = {"embedding_init": nnx.initializers.normal(0.02), **options}
        self.embedding = nnx.Embed(classes or args.vocabulary, args.dim, **small)
        self.position = nnx.Embed(args.context, args.dim, **small)
        blocks = [Block(args.dim, args.heads, **options) for _ in range(args.layers)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.RMSNorm(args.dim, **options)

    def __call__(self, tokens):
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    @property
    def kernel(self):
        """The kernel [D, K] of the last layer: the transposed embedding."""
        return self.embedding.embedding[...].astype(self.embedding.dtype).T


def optax_loss(hidden, kernel, labels):
    """Compute the logits in the model's dtype, and the loss from them in float32."""
    logits = (hidden @ kernel).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


LOSSES = {"optax": optax_loss, "sxe": sxe.linear_softmax_cross_entropy}


class Run(NamedTuple):
    """The results of one training run, which runs in its own process."""

    device: str
    losses: np.ndarray  # one per step
    held_out: float
    tokens_per_second: float
    peak_of: str  # "device" or "process"
    peak_bytes: int
    peak_bytes_before: int  # before the first step: imports, compilers, parameters
    temporary_bytes: int
    sample: list[int]


def peak_memory():
    """What is measured, "device" or "process", and its peak memory so far, in bytes."""
    stats = jax.devices()[0].memory_stats() or {}  # None on a CPU
    if "peak_bytes_in_use" in stats:
        return "device", stats["peak_bytes_in_use"]
    # Avoid ru_maxrss where possible: on Linux it starts from the peak of the parent process, which
    # has trained the tokenizer.
    status = Path("/proc/self/status")
    found = status.exists() and re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    if found:
        return "process", int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return "process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_functions(name, args):
    """The graph of the model, and the functions `init()`, `loss_fn(params, windows)` and `step`.

    `step(params, opt_state, windows)` returns the new params and opt_state, and the loss.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.steps // 10, args.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def new_model():
        return Transformer(args, classes=args.classes, dtype=args.dtype, rngs=nnx.Rngs(args.seed))

    graph, _ = nnx.split(nnx.eval_shape(new_model), nnx.Param)

    def init():
        params = nnx.state(new_model(), nnx.Param)
        return params, optimizer.init(params)

    def loss_fn(params, windows):
        model = nnx.merge(graph, params)
        return LOSSES[name](model(windows[:, :-1]), model.kernel, windows[:, 1:])

    def step(params, opt_state, windows):
        loss, grads = jax.value_and_grad(loss_fn)(params, windows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return graph, init, loss_fn, step


def compile_step(init, step, window_shape):
    """Compile the step from the shapes of its arguments. It donates params and opt_state."""
    windows = jax.ShapeDtypeStruct(window_shape, jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*jax.eval_shape(init), windows).compile()


def step_bytes(compiled):
    """The bytes that a compiled step needs, including its arguments and results."""
    memory = compiled.memory_analysis()
    arguments_and_results = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # results that reuse the memory of arguments
    )
    return arguments_and_results + memory.temp_size_in_bytes


def train(name, args, tokens, held_out, prompt):
    """Train with the loss called `name`, and return a Run."""
    graph, init, loss_fn, step = make_functions(name, args)

    @jax.jit
    def generate(params, tokens, length, key):
        """Sample the tokens [1, T] after the first `length`; the causal mask hides later tokens."""
        model = nnx.merge(graph, params)

        def add_one(i, tokens):
            logits = (model(tokens)[0, i - 1] @ model.kernel)[: args.vocabulary]
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / args.temperature)
            return tokens.at[0, i].set(token)

        return jax.lax.fori_loop(length, tokens.shape[1], add_one, tokens)

    # A window has one token more than the model sees, the label of the last position.
    window = np.arange(args.context + 1)
    starts = np.random.default_rng(args.seed).integers(
        len(tokens) - args.context, size=(args.steps, args.batch_size)
    )
    params, opt_state = jax.jit(init)()
    compiled = compile_step(init, step, (args.batch_size, args.context + 1))
    _, peak_bytes_before = peak_memory()
    losses, seconds = [], []
    progress = tqdm(starts, desc=f"training with {name}", unit="step")
    for start in progress:
        began = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, tokens[start[:, None] + window])
        losses.append(float(loss))  # blocks until the step is done, for the timing
        seconds.append(time.perf_counter() - began)
        progress.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)

    # Use whole batches only, so that one compiled program evaluates all of them.
    evaluate = jax.jit(loss_fn)
    count = (len(held_out) - 1) // (args.batch_size * args.context)
    starts = args.context * np.arange(count * args.batch_size).reshape(count, args.batch_size, 1)
    held_out_loss = np.mean([float(evaluate(params, held_out[s + window])) for s in starts])
    peak_of, peak_bytes = peak_memory()

    sample = np.zeros((1, args.context), np.int32)
    sample[0, : len(prompt)] = prompt
    sample = generate(params, sample, len(prompt), jax.random.key(args.seed))
    return Run(
        device=jax.devices()[0].device_kind,
        losses=np.array(losses),
        held_out=float(held_out_loss),
        tokens_per_second=args.batch_size * args.context / float(np.median(seconds)),
        peak_of=peak_of,
        peak_bytes=peak_bytes,
        peak_bytes_before=peak_bytes_before,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        sample=np.asarray(sample)[0].tolist(),
    )


def measure_speed(name, args):
    """Take steps on one batch of random tokens, and print their speed, losses and memory."""
    _, init, _, step = make_functions(name, args)
    window_shape = (args.batch_size, args.context + 1)
    began = time.perf_counter()
    compiled = compile_step(init, step, window_shape)
    print(f"{name}: compiled in {time.perf_counter() - began:.1f} s", flush=True)

    params, opt_state = jax.block_until_ready(jax.jit(init)())
    classes = args.classes or args.vocabulary
    random_tokens = np.random.default_rng(args.seed).integers(classes, size=window_shape)
    windows = jnp.asarray(random_tokens, jnp.int32)
    _, peak_bytes_before = peak_memory()
    losses, seconds = [], []
    for _ in range(WARM_UP_STEPS + args.steps):
        began = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, windows)
        jax.block_until_ready((params, opt_state, loss))
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss))
    peak_of, peak_bytes = peak_memory()
    median = float(np.median(seconds[WARM_UP_STEPS:]))
    print(
        f"{name}: {args.batch_size * args.context / median:,.0f} tokens per second, "
        f"{1e3 * median:.1f} ms per step\n"
        f"{name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses) - 1} steps\n"
        f"{name}: peak memory of the {peak_of} {peak_bytes / MIB:,.0f} MiB, "
        f"{peak_bytes_before / MIB:,.0f} MiB before the first step; "
        f"the step as compiled needs {step_bytes(compiled) / MIB:,.0f} MiB, "
        f"{compiled.memory_analysis().temp_size_in_bytes / MIB:,.0f} MiB of it temporaries",
        flush=True,
    )


def memory_limit(args):
    """The memory limit in bytes: --memory, or the memory that JAX may use on the device."""
    if args.memory is not None:
        return args.memory * 2**30
    stats = jax.devices()[0].memory_stats() or {}  # None on a CPU
    if "bytes_limit" not in stats:
        raise SystemExit("this device reports no memory limit: pass --memory, in GiB")
    return stats["bytes_limit"]


def try_batch(name, args, batch_size):
    """Compile the step for this batch size. Print and return its bytes, or inf if that fails.

    On a GPU, XLA autotunes the matrix products by running them. This may already need more memory
    than the device has.
    """
    _, init, _, step = make_functions(name, args)
    began = time.perf_counter()
    try:
        needed = step_bytes(compile_step(init, step, (batch_size, args.context + 1)))
        found = f"needs {needed / MIB:,.0f} MiB"
    except jax.errors.JaxRuntimeError as error:
        needed, found = math.inf, f"does not compile: {str(error).splitlines()[0]}"
    print(f"{name}: batch {batch_size:,} {found}, {time.perf_counter() - began:.1f} s", flush=True)
    return needed


def next_batch(needed, limit):
    """The next batch size to try, or None. `needed` maps the sizes tried so far to their bytes."""
    fits = max(size for size in needed if needed[size] <= limit)
    too_large = min((size for size in needed if needed[size] > limit), default=math.inf)
    first, last = next(iter(needed)), list(needed)[-1]
    if len(needed) == 1:
        candidates = [2 * fits]
    elif math.inf in needed.values():
        candidates = [(fits + too_large) // 2]
    else:  # memory grows about linearly; first aim a little below the limit, to be safe
        bytes_of_one = (needed[last] - needed[first]) / (last - first)
        targets = ((1 + CLOSE_TO_LIMIT) / 2 * limit, limit)
        candidates = [int(last + (target - needed[last]) / bytes_of_one) for target in targets]
    multiples = [size - size % BATCH_MULTIPLE for size in candidates]
    return next((size for size in multiples if fits < size < too_large), None)


def measure_largest_batch(name, args):
    """Print approximately the largest batch whose step fits. Steps are compiled, but not run."""
    limit = memory_limit(args)
    needed = {}  # bytes by batch size, in the order of the trials
    batch_size = args.batch_size
    while batch_size is not None and len(needed) < MOST_COMPILES:
        needed[batch_size] = try_batch(name, args, batch_size)
        if needed[args.batch_size] > limit:
            raise SystemExit(f"{name}: batch {batch_size} does not fit: lower --batch-size")
        largest = max(size for size in needed if needed[size] <= limit)
        close = needed[largest] >= CLOSE_TO_LIMIT * limit
        batch_size = None if close else next_batch(needed, limit)
    print(
        f"{name}: largest batch {largest:,}, {largest * args.context:,} tokens: needs "
        f"{needed[largest] / MIB:,.0f} MiB of {limit / MIB:,.0f} MiB",
        flush=True,
    )


MEASUREMENTS = {"speed": measure_speed, "largest-batch": measure_largest_batch}


def in_new_process(function, *args):
    """Call the function in a new process, because the peak memory of a process never falls."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def report(runs):
    """Print a table with one column per loss, and the largest difference between the curves."""
    some = next(iter(runs.values()))
    tail = min(20, len(some.losses))
    rows = [
        (f"train loss, last {tail} steps", "{:.4f}", lambda run: run.losses[-tail:].mean()),
        ("held-out loss", "{:.4f}", lambda run: run.held_out),
        ("tokens per second", "{:,.0f}", lambda run: run.tokens_per_second),
        (f"peak memory of the {some.peak_of}", "{:,.0f} MiB", lambda run: run.peak_bytes / MIB),
        ("  before the first step", "{:,.0f} MiB", lambda run: run.peak_bytes_before / MIB),
        ("temporaries of a step", "{:,.0f} MiB", lambda run: run.temporary_bytes / MIB),
    ]
    print(f"{'on ' + some.device:32}" + "".join(f"{name:>12}" for name in runs))
    for title, form, value in rows:
        print(f"{title:32}" + "".join(f"{form.format(value(run)):>12}" for run in runs.values()))
    if len(runs) == 2:
        difference = np.max(np.abs(np.subtract(*(r.losses for r in runs.values()))))
        print(f"largest difference between the loss curves: {difference:.1e} nats")


def draw(runs, path):
    """Draw the loss of every step (left), and speed and memory (right)."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4, 5))
    ax = left.subplots()
    # The curves coincide, so draw the second as a thin line inside the first.
    for width, color, (name, run) in zip((5, 1.5), ("C0", "C1"), runs.items(), strict=False):
        ax.plot(np.arange(1, len(run.losses) + 1), run.losses, color, linewidth=width, label=name)
    ax.set(title="Training loss", xlabel="step", ylabel="mean cross-entropy (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()

    peak_of = next(iter(runs.values())).peak_of
    bars = {
        "tokens per second": [run.tokens_per_second for run in runs.values()],
        f"peak memory\nof the {peak_of} (MiB)": [run.peak_bytes / MIB for run in runs.values()],
        "temporaries\nof a step (MiB)": [run.temporary_bytes / MIB for run in runs.values()],
    }
    for ax, (title, values) in zip(right.subplots(1, len(bars)), bars.items(), strict=True):
        drawn = ax.bar(list(runs), values, color=("C0", "C1")[: len(runs)])
        ax.bar_label(drawn, fmt="{:,.0f}")
        ax.set_title(title, fontsize="medium")
        ax.set_yticks([])
        ax.spines[["left", "top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description="Train a language model with optax's loss and sxe's."
    )
    parser.add_argument("--loss", choices=("both", *LOSSES), default="both")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--dim", type=int, default=DIM, help="size of the hidden states")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"default: {LEARNING_RATE:g} up to --dim {DIM}, proportional to 1 / dim above",
    )
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument(
        "--classes", type=int, help="classes of the last layer; default: --vocabulary"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--text-bytes", type=int, default=6_000_000, help="bytes of source to read")
    parser.add_argument("--held-out-files", type=int, default=8)
    parser.add_argument("--prompt", default="def", help="beginning of the sample")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="language_model.png", help="where to write the figure")
    parser.add_argument(
        "--measure",
        choices=tuple(MEASUREMENTS),
        help="measure a training step instead of training on text",
    )
    parser.add_argument(
        "--memory",
        type=float,
        help="GiB for --measure largest-batch; default: all memory that JAX may use on the device",
    )
    parser.add_argument("--smoke", action="store_true", help="train a tiny model for a few steps")
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()
    if args.classes is not None and args.classes < args.vocabulary:
        parser.error(f"--classes: expected at least {args.vocabulary} classes, got {args.classes}")
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATE * min(1, DIM / args.dim)

    names = LOSSES if args.loss == "both" else (args.loss,)
    if args.measure:
        for name in names:
            in_new_process(MEASUREMENTS[args.measure], name, args)
        return

    texts, held_out_texts = read_sources(args.text_bytes, args.held_out_files)
    tokenizer = train_tokenizer(texts, args.vocabulary)
    tokens, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    if len(held_out) <= args.batch_size * args.context:
        raise SystemExit(
            f"{len(held_out)} held-out tokens are fewer than a batch needs: raise --held-out-files"
        )
    print(f"{len(texts)} files, {len(tokens):,} tokens; {len(held_out_texts)} files held out")

    prompt = tokenizer.encode(args.prompt).ids
    runs = {name: in_new_process(train, name, args, tokens, held_out, prompt) for name in names}
    report(runs)
    draw(runs, args.figure)
    print(f"loss curves, speed and memory: {args.figure}")
    name, run = list(runs.items())[-1]
    print(f"a sample of the model trained with {name}:\n{tokenizer.decode(run.sample)}")


if __name__ == "__main__":
    main()
