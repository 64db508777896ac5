"""Train the transformer of language_model.py on a mesh of devices, then on one, and compare.

The batch is sharded over the mesh axis "data", and the 16,384 classes of the last layer over the
axis "model". The kernel of the last layer is the transposed embedding. Its hidden axis is sharded
over "data", as in FSDP. So each device has a shard of the embedding and of its Adam moments, and a
copy of all other parameters. `sxe.over_mesh` wraps sxe's loss so that it takes global
arrays with these shardings. The default is eight virtual CPU devices; `--devices 0` uses the
devices of the machine:

    python examples/sharded_training.py --mesh data=2,model=4

Several processes can run the same code, each with some of the devices. These commands start two
processes on one machine:

    python examples/sharded_training.py --coordinator 127.0.0.1:9876 --processes 2 --process-id 0 &
    python examples/sharded_training.py --coordinator 127.0.0.1:9876 --processes 2 --process-id 1

With `--checkpoint-dir`, a stopped run continues from its last checkpoint when it is started again
with the same options. At the end the script takes the same steps on one device, without
`sxe.over_mesh`, and exits with status 1 if the loss curves differ.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from language_model import Transformer, encode, read_sources, train_tokenizer
from tqdm import tqdm

import sxe

# In nats. On a mesh, sums are computed in another order, which changes a loss by one or two units
# in the last place. With a learning rate of 4e-3 or more, training is unstable, and the difference
# grows with the steps.
TOLERANCE = 1e-5

# Takes seconds instead of minutes. A run that continues from the checkpoint has two steps left.
SMOKE = {
    "steps": 6,
    "checkpoint_every": 4,
    "context": 64,
    "dim": 32,
    "layers": 1,
    "heads": 2,
    "vocabulary": 2048,
    "text_bytes": 200_000,
}


def start_jax(args):
    """Set up devices and processes, before JAX initializes them."""
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices // args.processes)
    if args.coordinator:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process_id,
            shutdown_timeout_seconds=3600,  # others wait while process 0 trains on one device
        )


def axes(text):
    """Parse data=2,model=4 into {"data": 2, "model": 4}."""
    return {name: int(size) for name, _, size in (axis.partition("=") for axis in text.split(","))}


def make_mesh(axes):
    """A mesh of all devices of all processes."""
    if axes.keys() != {"data", "model"} or math.prod(axes.values()) != jax.device_count():
        raise SystemExit(
            f"--mesh: expected axes data and model over {jax.device_count()} devices, got {axes}"
        )
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def make_batches(args):
    """The windows of tokens for each step, [steps, B, T + 1], equal in all processes and runs.

    A window has one token more than the model sees, the label of the last position.
    """
    texts, _ = read_sources(args.text_bytes, held_out_files=0)
    tokens = encode(train_tokenizer(texts, args.vocabulary), texts)
    starts = np.random.default_rng(args.seed).integers(
        len(tokens) - args.context, size=(args.steps, args.batch_size, 1)
    )
    return tokens[starts + np.arange(args.context + 1)]


def make_functions(args, loss, table=lambda embedding: embedding):
    """The functions `init()` and `step(state, windows)`. Only `loss` and `table` depend on a mesh.

    `table` turns the embedding into the array in which the model looks tokens up.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.steps // 10, args.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def new_model():
        return Transformer(args, rngs=nnx.Rngs(args.seed))

    graph, _ = nnx.split(nnx.eval_shape(new_model), nnx.Param)

    def init():
        params = nnx.to_pure_dict(nnx.state(new_model(), nnx.Param))
        return {"params": params, "optimizer": optimizer.init(params)}

    def loss_fn(params, windows):
        model = nnx.merge(graph, params)
        kernel, embedding = model.kernel, model.embedding.embedding
        embedding[...] = table(embedding[...])
        return loss(model(windows[:, :-1]), kernel, windows[:, 1:])

    def step(state, windows):
        params = state["params"]
        value, grads = jax.value_and_grad(loss_fn)(params, windows)
        updates, moments = optimizer.update(grads, state["optimizer"], params)
        return {"params": optax.apply_updates(params, updates), "optimizer": moments}, value

    return init, step


def split_embedding(state, mesh):
    """The shardings of a state. Only the embedding [K, D] and its moments are sharded."""

    def sharding(path, leaf):
        embedding = "['embedding']['embedding']" in jax.tree_util.keystr(path)
        return NamedSharding(mesh, P("model", "data") if embedding else P())

    return jax.tree.map_with_path(sharding, state)


def train(title, step, state, batches, first=0, after_step=lambda done, state: None):
    """Take the steps from `first` on. Returns the last state, the losses, and their seconds."""
    losses, seconds = [], []
    progress = tqdm(
        batches[first:],
        desc=title,
        initial=first,
        total=len(batches),
        unit="step",
        disable=jax.process_index() != 0,
    )
    for done, windows in enumerate(progress, first + 1):
        began = time.perf_counter()
        state, loss = step(state, windows)
        losses.append(float(loss))  # blocks until the step is done, for the timing
        seconds.append(time.perf_counter() - began)
        progress.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
        after_step(done, state)
    return state, np.array(losses), seconds


def train_on_mesh(args, mesh, batches):
    """Train from the last checkpoint, or from step 0. Returns that step and `train`'s results."""
    loss = sxe.over_mesh(
        sxe.linear_softmax_cross_entropy, mesh, batch="data", classes="model", fsdp="data"
    )

    def table(embedding):
        # The tokens are sharded over "data", so each device needs whole rows of the embedding. The
        # loss gathers its kernel itself.
        return jax.lax.with_sharding_constraint(embedding, NamedSharding(mesh, P("model")))

    init, step = make_functions(args, loss, table)
    shapes = jax.eval_shape(init)
    shardings = split_embedding(shapes, mesh)
    replicated, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))

    def mesh_step(state, windows):
        # Each process provides the rows of its own devices.
        return step(
            state, jax.make_array_from_callback(windows.shape, rows, lambda index: windows[index])
        )

    title = "training on the mesh"
    new_state = jax.jit(init, out_shardings=shardings)
    if not args.checkpoint_dir:
        return 0, *train(title, mesh_step, new_state(), batches)

    with ocp.CheckpointManager(Path(args.checkpoint_dir).absolute()) as manager:
        first = manager.latest_step() or 0
        if first:
            like = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, shardings)
            state = manager.restore(first, args=ocp.args.StandardRestore(like))
        else:
            state = new_state()

        def save(done, state):
            if done % args.checkpoint_every == 0:
                manager.save(done, args=ocp.args.StandardSave(state))

        return first, *train(title, mesh_step, state, batches, first, save)


def train_on_one_device(args, batches):
    """The losses of the same steps, on the first device of this process."""
    init, step = make_functions(args, sxe.linear_softmax_cross_entropy)
    step = jax.jit(step, donate_argnums=0)
    _, losses, _ = train("training on one device", step, jax.jit(init)(), batches)
    return losses


def main():
    parser = argparse.ArgumentParser(description="Train a language model on a mesh of devices.")
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices; 0: real ones")
    parser.add_argument(
        "--mesh", type=axes, default="data=2,model=4", help="devices along each axis"
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, for several processes")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process-id", type=int, default=0)
    parser.add_argument("--checkpoint-dir", help="same for all processes")
    parser.add_argument("--checkpoint-every", type=int, default=8, help="number of steps")
    parser.add_argument("--no-compare", action="store_true", help="do not train on one device")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--dim", type=int, default=128, help="size of the hidden states")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--text-bytes", type=int, default=6_000_000, help="bytes of source to read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="train a tiny model for a few steps")
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()

    start_jax(args)
    mesh = make_mesh(args.mesh)
    batches = make_batches(args)
    first, state, losses, seconds = train_on_mesh(args, mesh, batches)
    if jax.process_index() != 0:
        return
    if first >= args.steps:
        raise SystemExit(f"{args.checkpoint_dir} has a checkpoint of step {first}: no steps left")

    embedding = state["params"]["embedding"]["embedding"]
    part = embedding.addressable_data(0)
    kind = jax.devices()[0].device_kind
    shape = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
    print(f"processes: {jax.process_count()}, devices: {mesh.size} ({kind}), mesh: {shape}")
    print(f"kernel: {list(embedding.shape[::-1])}, {embedding.nbytes:,} bytes")
    print(f"  on each device: {list(part.shape[::-1])}, {part.nbytes:,} bytes")
    if first:
        print(f"resumed from the checkpoint of step {first}")
    print(f"loss of step {first + 1}: {losses[0]:.4f}, of step {args.steps}: {losses[-1]:.4f}")
    tokens = args.batch_size * args.context
    print(f"tokens per second: {tokens / float(np.median(seconds)):,.0f}")
    if args.no_compare:
        return
    one = train_on_one_device(args, batches)[first:]
    difference = np.max(np.abs(losses - one))
    print(f"largest difference between the loss curves: {difference:.1e} nats")
    if not difference <= TOLERANCE:  # also if it is NaN
        print(f"DIFFERS from one device by more than {TOLERANCE:.0e} nats")
        sys.exit(1)
    print("matches one device")


if __name__ == "__main__":
    main()
