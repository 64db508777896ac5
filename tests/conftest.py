"""Eight virtual devices and JAX's strictest settings, for every test."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

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
