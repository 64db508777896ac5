"""Programs that compile fast, for tests that do not depend on how well XLA optimises them.

Compiling is most of the time of such a test. conftest.py has the same settings for all tests, but
the user's XLA_FLAGS replace those, as they do in CI.
"""

import functools

import jax

QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def all_of(functions):
    """One function of a list with a tuple of arguments for each of these functions.

    One program is compiled faster than many.
    """
    functions = list(functions)

    def program(arguments):
        return [f(*a) for f, a in zip(functions, arguments, strict=True)]

    return program
