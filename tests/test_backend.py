"""The facts about platforms and versions, and where a program will run."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sxe
from sxe import _backend
from sxe._backend import MIB, Backend, ChunkLimits, apart, backend_of, bits_of

VERSIONS = ((0, 10, 2), (0, 11, 0), (0, 12, 0))
BACKENDS = [
    Backend(*each) for each in itertools.product(("cpu", "gpu", "tpu"), (True, False), VERSIONS)
]
FLOATS = ("float16", "bfloat16", "float32", "float64")

# Where each property is true: platform, is_local, versions
WHERE_TRUE = {
    "loops_over_rows": ("cpu", (True,), VERSIONS),
    "writes_out_shared_terms": ("cpu", (True, False), VERSIONS),
    "writes_out_comparisons": ("cpu", (True, False), VERSIONS),
    "takes_few_classes_one_by_one": ("cpu", (True,), VERSIONS[1:]),
    "widens_arrays_in_loops": ("cpu", (True, False), VERSIONS[:1]),
    "writes_out_transformed_logits": ("cpu", (True, False), VERSIONS[1:]),
    "copies_scaled_gradients": ("tpu", (True, False), VERSIONS),
    "widens_what_it_exchanges": ("cpu", (True, False), VERSIONS),
}


@pytest.mark.parametrize(("name", "where"), WHERE_TRUE.items(), ids=WHERE_TRUE)
def test_what_is_true_of_which_backends(name, where):
    platform, local, versions = where
    for backend in BACKENDS:
        expected = (
            backend.platform == platform
            and backend.is_local in local
            and backend.jax_version in versions
        )
        assert getattr(backend, name) is expected, backend


def test_the_version_is_that_of_the_jax_that_runs():
    assert Backend("cpu", is_local=True).jax_version == jax.__version_info__


def test_bytes_of_blocks():
    for backend in BACKENDS:
        assert (backend.row_block_bytes, backend.class_block_bytes) == (4 * MIB, 8 * MIB)


def test_a_gpu_multiplies_whole_16_bytes_of_classes():
    for backend in BACKENDS:
        assert backend.class_multiple == (8 if backend.platform == "gpu" else 1)


DTYPES = {
    # platform, dtype of hidden states and kernel: dtype of the logits' product, of the gradients'
    ("cpu", "float16"): ("float32", "float32"),
    ("cpu", "bfloat16"): ("bfloat16", "float32"),
    ("cpu", "float32"): ("float32", "float32"),
    ("cpu", "float64"): ("float64", "float64"),
    ("gpu", "float16"): ("float16", "float32"),
    ("gpu", "bfloat16"): ("bfloat16", "bfloat16"),
    ("gpu", "float32"): ("float32", "float32"),
    ("gpu", "float64"): ("float64", "float64"),
}


def test_dtypes_of_products():
    for backend, dtype in itertools.product(BACKENDS, FLOATS):
        platform = "gpu" if backend.platform == "tpu" else backend.platform
        of_both = jnp.dtype(dtype)
        found = backend.product_dtype(of_both), backend.gradient_dtype(of_both)
        assert found == DTYPES[platform, dtype], (backend, dtype)


def test_limits_of_chunks():
    for backend, dtype in itertools.product(BACKENDS, FLOATS):
        if backend.platform == "cpu":
            bytes_of_logits = 24 if backend.jax_version == VERSIONS[0] else 48
            expected = ChunkLimits(bytes_of_logits * MIB, wanted_rows=128, fewest_chunks=16)
        else:
            rows = 2048 if dtype in ("float16", "bfloat16") else 512
            expected = ChunkLimits(32 * MIB, wanted_rows=rows, fewest_chunks=8)
        assert backend.chunk_limits(jnp.dtype(dtype)) == expected, (backend, dtype)


# Where a program will run


def abstract_mesh(platform, *sizes):
    # JAX 0.10.0 has no platform of a device.
    kind = {"cpu": "cpu", "tpu": "TPU v5e"}.get(platform, "NVIDIA H100 80GB HBM3")
    named = {"platform": platform} if jax.__version_info__ >= (0, 10, 1) else {}
    device = AbstractDevice(device_kind=kind, num_cores=None, **named)
    names = ("data", "model")[: len(sizes)]
    kinds = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(sizes, names, axis_types=kinds, abstract_device=device)


def host_of(monkeypatch, devices):
    """A process with this number of devices."""
    monkeypatch.setattr("sxe._backend.device_count", lambda: devices)


@pytest.mark.parametrize(
    ("platform", "name"),
    [("tpu", "tpu"), ("gpu", "gpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("cpu", "cpu")],
)
def test_the_mesh_around_a_call_says_where_it_runs(platform, name):
    with jax.sharding.use_abstract_mesh(abstract_mesh(platform, 4, 2)):
        assert backend_of() == Backend(name, is_local=False)
        found = sxe.plan(8192, 4096, 128256, "bfloat16")
    if name != "cpu":  # on a CPU it depends on the number of devices
        assert found == sxe.plan(8192, 4096, 128256, "bfloat16", backend=name)
    assert backend_of().platform == jax.default_backend()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_without_a_mesh_an_array_may_be_split_over_all_devices(monkeypatch, devices):
    host_of(monkeypatch, devices)
    assert backend_of() == Backend(jax.default_backend(), is_local=devices == 1)
    assert backend_of(jnp.ones(3)) == Backend(jax.default_backend(), is_local=devices == 1)


@pytest.mark.parametrize(("sizes", "local"), [((1,), True), ((1, 1), True), ((1, 2), False)])
def test_a_mesh_of_one_device_splits_nothing(monkeypatch, sizes, local):
    host_of(monkeypatch, 1)
    with jax.sharding.use_abstract_mesh(abstract_mesh("cuda", *sizes)):
        assert backend_of() == Backend("gpu", is_local=local)


def test_the_types_of_arrays_say_where_they_are(monkeypatch):
    host_of(monkeypatch, 1)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("data")))
    found = []
    jax.jit(lambda x: found.append(backend_of(x * 2)))(x)
    jax.jit(
        jax.shard_map(lambda x: found.append(backend_of(x)), mesh=mesh, in_specs=P(), out_specs=P())
    )(x)
    platform = jax.default_backend()
    assert found == [Backend(platform, is_local=False), Backend(platform, is_local=True)]


@pytest.mark.parametrize("manual", [{"data"}, {"model"}, {"data", "model"}], ids=sorted)
def test_an_array_is_whole_where_all_mesh_axes_are_manual(manual):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    found = []
    look = jax.shard_map(
        lambda x: found.append(backend_of(x)),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        axis_names=manual,
    )
    jax.jit(look)(jnp.ones((8, 8)))
    assert [backend.is_local for backend in found] == [len(manual) == 2]


@pytest.mark.parametrize("which", [0, 1])
def test_one_array_that_an_explicit_mesh_has_is_enough(monkeypatch, which):
    host_of(monkeypatch, 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    arrays = [jnp.ones(8), jnp.ones(8)]
    arrays[which] = jax.device_put(arrays[which], NamedSharding(mesh, P("data")))
    assert not backend_of(*arrays).is_local
    assert backend_of(arrays[1 - which]).is_local


@pytest.mark.parametrize(("spec", "local"), [(P("data"), False), (P(), True)])
def test_an_axis_that_a_type_names_splits_however_few_devices_it_has(monkeypatch, spec, local):
    host_of(monkeypatch, 1)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec))
    assert backend_of(x).is_local == local


# Hiding arrays from XLA


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_apart_hides_on_a_cpu_alone(backend):
    hidden = "optimization_barrier" in str(
        jax.make_jaxpr(apart, static_argnums=2)(1.0, 2.0, backend)
    )
    assert hidden == (backend.platform == "cpu")


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_apart_is_the_identity_of_its_first_argument(platform):
    f = functools.partial(apart, backend=Backend(platform, is_local=True))
    m, after = jnp.array([1.0, -np.inf, 3.0]), jnp.array([4.0, 5.0, np.inf])
    value, pullback = jax.vjp(f, m, after)
    np.testing.assert_array_equal(value, m)
    g = jnp.array([2.0, 3.0, 5.0])
    for found, expected in zip(pullback(g), (g, jnp.zeros(3)), strict=True):
        np.testing.assert_array_equal(found, expected)
    _, tangent = jax.jvp(f, (m, after), (g, 7 * g))
    np.testing.assert_array_equal(tangent, g)


def test_no_derivative_of_what_only_hides_is_looked_at():
    f = functools.partial(apart, backend=Backend("cpu", is_local=True))

    def tangent(m, after, m_dot, after_dot):
        return jax.jvp(f, (m, after), (m_dot, after_dot))[1]

    jaxpr = jax.make_jaxpr(tangent)(*4 * [jnp.ones(3)]).jaxpr
    used = [x for eqn in jaxpr.eqns for x in eqn.invars]
    m_dot, after_dot = (any(x is y for y in used) for x in jaxpr.invars[2:])
    assert (m_dot, after_dot) == (True, False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int16", "int32", "bool"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_bits_of_arrays_of_16_bits(backend, dtype):
    x = jnp.array([[0, 1, -2.5], [np.nan, 3, np.inf]]).astype(dtype)
    bits = bits_of(x, backend)
    widened = backend.platform == "cpu" and backend.jax_version < (0, 11)
    if widened and x.dtype.itemsize == 2:
        assert bits.dtype == np.uint16
        np.testing.assert_array_equal(bits, np.asarray(x).view(np.uint16))
    else:
        assert bits is x


@pytest.mark.parametrize(
    ("kind", "platform"), [("cpu", "cpu"), ("TPU v5e", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu")]
)
def test_the_platform_of_a_device_with_a_kind_only(kind, platform):
    """JAX 0.10.0 does not name the platform of an abstract device."""
    assert _backend._platform(types.SimpleNamespace(device_kind=kind)) == platform
