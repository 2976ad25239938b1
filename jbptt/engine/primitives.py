"""JAX's operations by name: what they cost, and what is known of them.

A name that is missing costs speed. In MOVES and REPEATS it also costs digits: sums over examples
in half precision are then not held in float32 (`jaxprs.moved_wide`). In CALLS it makes more leaves
count as read than a loss reads.
"""

# Programs that are called with the equation's own operands: by the parameter that holds them.
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
}

# fmt: off
# Cheaper to compute again from one array than to write and read it.
CHEAP = frozenset((
    "abs", "add", "add_any", "and", "broadcast_in_dim", "concatenate", "conj",
    "convert_element_type", "copy", "eq", "expand_dims", "ge", "gt", "imag", "integer_pow",
    "is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pcast", "pvary",
    "real", "reduce_precision", "reshape", "rev", "select_n", "sign", "slice", "split", "square",
    "squeeze", "stop_gradient", "sub", "transpose", "xor",
))
# What only moves or repeats the numbers of its first argument.
MOVES = frozenset((
    "broadcast_in_dim", "dynamic_slice", "gather", "reshape", "rev", "slice", "split", "squeeze",
    "transpose",
))
# Repeat a scalar or an axis of one as often as the other argument has it.
REPEATS = frozenset(("add", "atan2", "div", "max", "min", "mul", "pow", "rem", "sub"))
# Give the same numbers side by side, under `vmap`, as one after another.
ALIKE = CHEAP | MOVES | frozenset((
    "acos", "acosh", "argmax", "argmin", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "cos", "cosh", "cummax", "cummin", "cumprod",
    "cumsum", "digamma", "div", "dot_general", "dynamic_update_slice", "erf", "erf_inv", "erfc",
    "exp", "exp2", "expm1", "floor", "iota", "lgamma", "log", "log1p", "logistic", "nextafter",
    "pow", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "rem", "round", "rsqrt", "scatter-add", "scatter_add", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sin", "sinh", "sqrt", "tan", "tanh",
))
# So do these, for threefry keys alone.
RANDOM = frozenset((
    "random_bits", "random_fold_in", "random_seed", "random_split", "random_unwrap", "random_wrap",
))
# Give entry by entry what depends on the operands' entries there alone.
ENTRYWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh", "cbrt",
    "ceil", "clamp", "complex", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh",
    "digamma", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "imag",
    "integer_pow", "lgamma", "log", "log1p", "logistic", "max", "min", "mul", "neg", "pcast", "pow",
    "pvary", "real", "reduce_precision", "rem", "round", "rsqrt", "sharding_constraint", "sign",
    "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh",
))
# Reduce whole axes.
FOLDS = frozenset(("reduce_max", "reduce_min", "reduce_prod", "reduce_sum"))
# Go along one axis.
SCANS = frozenset(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"))
# fmt: on
