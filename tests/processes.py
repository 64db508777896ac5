"""One process of a training run on a mesh of 8 virtual devices, shared by all its processes.

python tests/processes.py --processes 2 --process-id 0 --port 12345 --out run.npz
"""

import argparse
import functools
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sxe

DEVICES = 8
N, D, K, VOCABULARY = 32, 8, 24, 11

# Seconds until a process gives up on another that does not answer. JAX's defaults are 100 and 300.
TIMEOUT = 10

optimizer = optax.adam(3e-2)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process-id", type=int, default=0)
    parser.add_argument("--port", type=int, help="of the coordinator, process 0")
    parser.add_argument("--plain", action="store_true", help="one device, without over_mesh")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--checkpoint-dir", type=Path)
    parser.add_argument("--save-at", type=int, help="the step after which to write a checkpoint")
    parser.add_argument("--restore", action="store_true", help="start from the last checkpoint")
    parser.add_argument("--die-at", type=int, help="the step before which to be killed")
    parser.add_argument("--out", type=Path, help=".npz of losses, sums of weights and parameters")
    return parser.parse_args()


def make_mesh(plain):
    """A 2 x 4 mesh. Both rows and classes are sharded across processes, for two and for four."""
    order = [[0]] if plain else [[0, 1, 4, 5], [6, 7, 2, 3]]
    devices = np.array(jax.devices())[np.array(order)]
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def batch_at(step, mesh):
    """Tokens, labels and a mask of N rows. Each process makes the rows of its devices."""
    rng = np.random.default_rng(step)
    arrays = {
        "tokens": rng.integers(VOCABULARY, size=N, dtype=np.int32),
        "labels": rng.integers(K, size=N, dtype=np.int32),
        "where": rng.uniform(size=N) < 0.7,
    }
    split = NamedSharding(mesh, P("data"))
    return {
        name: jax.make_array_from_callback(a.shape, split, a.__getitem__)
        for name, a in arrays.items()
    }


def init():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (VOCABULARY, D), "layer": (D, D), "kernel": (D, K)}
    params = {
        name: jnp.asarray(rng.normal(size=shape) / D**0.5, jnp.float32)
        for name, shape in shapes.items()
    }
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def abstract_state(mesh):
    """Shapes and shardings. The head's kernel and Adam's state for it are sharded."""

    def abstract(path, x):
        spec = P("data", "model") if "kernel" in jax.tree_util.keystr(path) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(abstract, jax.eval_shape(init))


def make_train_step(mesh, shardings, plain):
    loss = sxe.linear_softmax_cross_entropy
    if not plain:
        loss = sxe.over_mesh(loss, mesh, batch="data", classes="model", fsdp="data")

    def loss_fn(params, tokens, labels, where):
        hidden = jnp.tanh(params["embedding"][tokens] @ params["layer"])
        return loss(
            hidden,
            params["kernel"],
            labels,
            where=where,
            label_smoothing=0.1,
            return_metrics=True,
        )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch):
        params = state["params"]
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, **batch)
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        state = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        # Adam's steps do not depend on the scale of a gradient, but its norm does.
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        return state, (loss, metrics.weight_sum, norm)

    return train_step


def main():
    args = parse_args()
    jax.config.update("jax_num_cpu_devices", 1 if args.plain else DEVICES // args.processes)
    if args.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}",
            args.processes,
            args.process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=120,
            heartbeat_timeout_seconds=TIMEOUT,
            shutdown_timeout_seconds=TIMEOUT,
        )
    mesh = make_mesh(args.plain)
    abstract = abstract_state(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    train_step = make_train_step(mesh, shardings, args.plain)
    manager = None
    if args.checkpoint_dir:
        import orbax.checkpoint as ocp  # here, because it is optional and pytest imports this file

        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        manager = ocp.CheckpointManager(args.checkpoint_dir, options=options)
    if args.restore:
        restore = ocp.args.StandardRestore(abstract)
        state = manager.restore(manager.latest_step(), args=restore)
    else:
        state = jax.jit(init, out_shardings=shardings)()

    results = []
    for step in range(int(state["step"]), args.steps):
        if step == args.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        state, result = train_step(state, batch_at(step, mesh))
        results.append([float(x) for x in result])
        if step + 1 == args.save_at:
            manager.save(step + 1, args=ocp.args.StandardSave(state))
    params = multihost_utils.process_allgather(state["params"], tiled=True)
    if args.process_id == 0 and args.out:
        losses, weight_sums, norms = np.transpose(results)
        params = {name: x.astype(np.float64) for name, x in params.items()}
        np.savez(args.out, losses=losses, weight_sums=weight_sums, norms=norms, **params)
    if manager:
        manager.close()


if __name__ == "__main__":
    main()
