"""How far a result may be from the right one: each tolerance by name, with its reason.

A *closeness* is relative to the largest entry of what is expected, and serves arrays whose entries
are of one scale. A *bar* is relative to each entry by itself, and serves the tests of precision:
there no entry may lose its digits beside a larger one.
"""

# 1. Closeness to a float64 oracle, by the dtype of the result. ``oracle.assert_close`` applies it.
CLOSENESS = {
    # The oracle's own rounding, and its central differences where the function is linear.
    "float64": 1e-12,
    # 25 units in the last place: a sum over classes, one over rows, and a product or two.
    "float32": 3e-6,
    # One unit in the last place: results are computed in float32 and rounded once.
    "bfloat16": 2**-8,
    "float16": 2**-10,
}

# 2. Bars for each entry above 1e-37 in float32, against 60-digit arithmetic. They are the project's
# promise: 8 units in the last place for a loss; for a gradient more, which has exp and log1p of a
# difference of logits, a quotient, and a product with a cotangent.
SMALLEST = 1e-37  # below it, float32 is about to leave its normal range
LOSS_BAR = 1e-6
GRADIENT_BAR = 2e-5
# The same for both in float64, where the 450 units in the last place hardly matter.
FLOAT64_BAR = 1e-13

# Of log-probabilities, entropies and divergences in float32: each value is relative to itself. A
# gradient, of which an entry may be a difference of two, is relative to the largest of its row.
LOG_PROB_BAR = 2e-6
ENTROPY_BAR = 5e-6
ENTROPY_GRADIENT_BAR = 2e-5
DIVERGENCE_BAR = 1e-5
DIVERGENCE_GRADIENT_BAR = 1e-4
# Where logits differ by less than this, what is rounded of log q - log p counts in inverse
# proportion: a tenth of it has ten times the bar.
CLOSE_LOGITS = 1e-3

# 3. Two float32 computations of one number, by different programs: eager and jitted, before and
# after export, in blocks and in one tile. Each may be off by a few units in the last place.
SAME_FLOAT32 = 1e-6

# An entry of float32 that is 0, or the small rest of terms of size 1 that cancel.
ZERO = 1e-6

# 4. Central differences of a float64 gradient of size 1, with steps of 1e-4: their own error is the
# square of the step, and rounding divided by the step.
CENTRAL_DIFFERENCES = 1e-8
