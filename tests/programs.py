"""Programs that compile fast, for tests that do not depend on XLA's optimizations.

Such a test spends most of its time compiling. conftest.py has the same settings for all tests, but
the user's XLA_FLAGS replace these settings, as in CI.
"""

import functools

import jax

QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def all_of(functions):
    """A single function that calls each function of a list with its own tuple of arguments.

    One large program compiles faster than many small ones.
    """
    functions = list(functions)

    def program(arguments):
        return [f(*a) for f, a in zip(functions, arguments, strict=True)]

    return program
