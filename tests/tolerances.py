"""How far a result may be from the exact one: each tolerance by name, with its reason.

A *closeness* is relative to the largest expected entry. It is for arrays whose entries are of
similar size. A *bar* is relative to each entry by itself. It is for tests of precision, where no
entry may lose its digits because another one is larger.
"""

# 1. Closeness to a float64 oracle, by the dtype of the result. ``oracle.assert_close`` applies it.
CLOSENESS = {
    # The error of the oracle, and of its central differences of a linear function.
    "float64": 1e-12,
    # 25 units in the last place: a sum over classes, one over rows, and one or two products.
    "float32": 3e-6,
    # One unit in the last place. Results are computed in float32 and rounded once.
    "bfloat16": 2**-8,
    "float16": 2**-10,
}

# 2. Bars for each entry above 1e-37 in float32, compared with 60-digit arithmetic. The project
# promises them: 8 units in the last place for a loss. A gradient has more, from exp and log1p of a
# difference of logits, a quotient, and a product with a cotangent.
SMALLEST = 1e-37  # close to the smallest normal number of float32
LOSS_BAR = 1e-6
GRADIENT_BAR = 2e-5
# The same for both in float64, where the 450 units in the last place hardly matter.
FLOAT64_BAR = 1e-13

# Log-probabilities, entropies and divergences in float32. A value is relative to itself. An entry
# of a gradient may be a difference of two numbers, so it is relative to the largest of its row.
LOG_PROB_BAR = 2e-6
ENTROPY_BAR = 5e-6
ENTROPY_GRADIENT_BAR = 2e-5
DIVERGENCE_BAR = 1e-5
DIVERGENCE_GRADIENT_BAR = 1e-4
# If logits differ by less than this, the rounding of log q - log p counts in inverse proportion: a
# tenth of this difference has ten times the bar.
CLOSE_LOGITS = 1e-3

# 3. Two float32 computations of one number by different programs: eager and jitted, before and
# after export, in blocks and in one tile. Each may be off by a few units in the last place.
SAME_FLOAT32 = 1e-6

# A float32 entry that is 0, or the small difference of terms of size 1 that cancel.
ZERO = 1e-6

# 4. Central differences of a float64 gradient of size 1, with steps of 1e-4. Their error is the
# square of the step, plus rounding divided by the step.
CENTRAL_DIFFERENCES = 1e-8
