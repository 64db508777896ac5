"""Eight virtual devices and JAX's strictest settings, for every test."""

import os

import jax
import pytest

# Compiling, often programs of one operation, is most of the tests' time, and takes less without
# optimizations. CI runs the tests with them as well.
flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if jax.__version_info__ < (0, 11):
    flags += ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_use_fusion_emitters=false"]
# XLA reads them when JAX first looks for devices. The user's come last, and win.
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    """Runs the test with 64-bit types off and on."""
    with jax.enable_x64(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _strict():
    """Of the tests alone: the doctests of README and package run as a user's session would."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Thousands of programs take gigabytes; no module needs those of another."""
    yield
    jax.clear_caches()
