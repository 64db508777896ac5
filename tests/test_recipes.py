"""The recipes run as a user runs them, and what they print is right; a new one is found."""

import importlib.util
import re

import pytest
from example_runs import ROOT, run_example

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("equinox", "flax"))),
    reason="the recipes need `pip install -e '.[examples]'`",
)

RECIPES = sorted(path.name for path in (ROOT / "examples" / "recipes").glob("*.py"))
FAST = {"tied_embedding_linen.py"}

# Of what a recipe prints beside differences: a pattern, and the range of the numbers in it.
LEARNS = [
    (r"^loss before training: (\S+)$", 6, 7),  # log 512 is 6.24
    (r"^loss after 100 steps: (\S+)$", 0, 0.1),
]
CLAIMS = {
    "distillation.py": [
        (r"agree on (\d+)% of the rows before training$", 0, 5),
        (r"agree on (\d+)% of the rows after 200 steps$", 50, 100),
    ],
    "distillation_without_logits.py": [
        (r"agree on (\d+)% of the rows before training$", 0, 5),
        (r"agree on (\d+)% of the rows after 200 steps$", 50, 100),
        (r"^temporaries: (\S+) MiB with the head, ", 62, 200),  # a gradient of the kernel is 62.5
        (r"^temporaries: .*, (\S+) MiB with logits$", 400, 1000),
    ],
    "gradient_accumulation.py": [
        (r"^mean of means: loss off by (\S+)%, gradient by \S+%$", 0.5, 10),
        (r"^mean of means: loss off by \S+%, gradient by (\S+)%$", 50, 1000),
    ],
    "grpo.py": [
        (r"^mean reward of rollout 1: (\S+)$", 0.4, 0.6),  # half of the classes are even
        (r"^mean reward of rollout 15: (\S+)$", 0.65, 1),
        (r"^tokens that count: (\d+)% of 2048$", 50, 95),
        (r"^exp\(d\) - 1 - d: off by up to (\S+)%$", 50, 1e4),
        (r"^expm1\(d\) - d: off by up to (\S+)%$", 0.05, 50),
        (r"^mean of k3: (\S+) times the divergence of \S+$", 0.8, 1.25),
    ],
    "mean_over_sequences.py": [
        (r"^mean over all tokens: loss off by (\S+)%, gradients by \S+%$", 0.5, 50),
        (r"^mean over all tokens: loss off by \S+%, gradients by (\S+)%$", 10, 1000),
    ],
    "mixed_precision.py": [
        (r"^step 1: loss (\S+), (\S+) in float32$", 6, 7),
        (r"^steps skipped: (\d+) of 300, ", 2, 30),
        (r"^loss of step 300: (\S+)$", 0, 0.1),
        (r"^gradient without scale: (\S+)% zeros", 1, 90),
        (r"^gradient without scale: .* relative error (\S+)$", 1e-2, 1),
        (r"^gradient with scale 2\^16: (\S+)% zeros", 0, 0.5),
        (r"^gradient with scale 2\^16: .* relative error (\S+)$", 0, 1e-2),
    ],
    "multi_token_prediction.py": [
        (r"^labels per depth: \[(\d+), (\d+), (\d+), (\d+)\]$", 121, 141),
        (r"^temporaries: (\S+) MiB with one call, ", 62, 200),  # a gradient of the kernel is 62.5
        (r"^temporaries: .*, (\S+) MiB with one call per depth, ", 250, 500),
    ],
    "packed_sequences.py": [
        (r"^6 documents, 82 tokens, in (\d+) sequences of 42$", 2, 2),
        (r"^labels across borders: gradients off by (\S+)%$", 10, 1000),
        (r"^attention across borders: gradients off by (\S+)%$", 10, 1000),
    ],
    "preference.py": [
        (r"^loss after 20 steps: (\S+), ", 0, 0.3),  # log 2 at first
        (r"chosen answer preferred in (\d+)% of pairs$", 100, 100),
    ],
    "supervised_fine_tuning.py": [
        (r"^16 prompts and answers: (\d+)% of 2048 positions count$", 20, 30),
        (r"^their labels are the answers with END: True$", 0, 0),
        (r"^mask not shifted: gradients off by (\S+)%$", 10, 1000),
    ],
    "tied_embedding_equinox.py": LEARNS,
    "tied_embedding_linen.py": LEARNS,
    "tied_embedding_nnx.py": LEARNS,
    "top_k_distillation.py": [
        (r"^stored: 8 of 1000 logits, with (\d+)% of the probability$", 70, 95),
        (r"agree on (\d+)% of the rows before training$", 0, 5),
        (r"agree on (\d+)% of the rows after 200 steps$", 70, 100),
    ],
}


def test_claims_are_of_recipes_that_exist():
    assert set(RECIPES) >= CLAIMS.keys()


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in RECIPES],
)
def test_recipe_prints_what_is_right(recipe, tmp_path):
    done = run_example(f"recipes/{recipe}", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "largest difference" in line]
    assert lines, f"expected a line with a largest difference, got {done.stdout}"
    for line in lines:
        assert 0 <= float(line.split()[-1]) < 2e-5, line
    for pattern, low, high in CLAIMS.get(recipe, ()):
        found = re.search(pattern, done.stdout, re.MULTILINE)
        assert found, f"expected {pattern}, got {done.stdout}"
        for number in found.groups():
            assert low <= float(number) <= high, found[0]
