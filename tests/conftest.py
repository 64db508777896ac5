"""Eight virtual devices and JAX's strictest settings, for all tests.

To run on an accelerator: JAX_PLATFORMS=cuda python -m pytest
"""

import gc
import math
import os
import shutil

import jax
import pytest

platforms = os.environ.get("JAX_PLATFORMS", "cpu")
flags = ["--xla_force_host_platform_device_count=8"]
if platforms == "cpu":
    # Most of the tests' time is compiling, often programs of one operation. It is faster without
    # optimizations. CI also runs the tests with optimizations.
    flags += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if platforms == "cpu" and jax.__version_info__ < (0, 11):
    flags += ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_use_fusion_emitters=false"]
# XLA reads these flags when JAX first looks for devices. The user's flags come last and win.
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU

jax.config.update("jax_platforms", platforms)

# Tracing creates many objects that live on. With Python's thresholds the garbage collector takes a
# tenth of the time, because it walks through them again and again.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    """Run the test with 64-bit types off and on."""
    with jax.enable_x64(request.param):
        yield request.param


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """A Chromium. Without one the test is skipped, or fails where SXE_BROWSER=required."""

    def unavailable(reason):
        if os.environ.get("SXE_BROWSER") == "required":
            pytest.fail(f"SXE_BROWSER=required, but {reason}")
        pytest.skip(reason)

    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed: pip install --group browser")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        unavailable(f"none of {', '.join(BROWSERS)} is on PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def double():
    """Run the test with 64-bit types on."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _strict():
    """Be strict in tests only: the doctests of README and package run as in a user's session."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def _meshes_of_devices_that_there_are(monkeypatch):
    """Skip tests that need more devices than this machine has, such as one GPU."""
    make_mesh = jax.make_mesh

    def make_or_skip(shape, *args, **kwargs):
        devices, there = math.prod(shape), len(jax.devices())
        if devices > there:
            pytest.skip(f"needs {devices} devices, and JAX has {there}")
        return make_mesh(shape, *args, **kwargs)

    monkeypatch.setattr(jax, "make_mesh", make_or_skip)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Free compiled programs, which take gigabytes. No module needs those of another."""
    yield
    jax.clear_caches()
