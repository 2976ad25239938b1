"""Running error analysis (Wilkinson, 1963): numbers that carry a bound on what rounding can have done to them.

A `Rounded` holds the exact value in float64 and a bound on |computed − exact| for a computation of the same formula
in a format of unit roundoff u (half of eps: 2⁻²⁴ float32, 2⁻¹¹ float16, 2⁻⁸ bfloat16). With errors a, b of the
operands A, B, and v = 2⁻²⁴ ≤ u, because XLA forms products, sums and functions of half precision in float32 and rounds
what comes out:

    A ± B: a + b + u (|A| + |B|)              covers every order in which a sum of such terms can be written
    A · B: |A| b + |B| a + a b + u |A B|
    A @ B: |A| b + a |B| + a b + (u + n v) |A| |B|        n products added in any order (Higham 2002, § 3.5)
    tanh:  (1 − tanh²) a + a² / 2 + (u + 4 v) |tanh|      |tanh''| < 1; four units for the approximation in use
    exp:   exp(A) (exp(a) − 1) + (u + 4 v) exp(A)

Where two formats meet, the result has the smaller u, as in JAX: gradients that add up in float32 round there.
"""

import numpy as np

UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}
INNER, FUNCTION = UNITS["float32"], 4  # units of float32 that tanh and exp may be off


class Rounded(np.lib.mixins.NDArrayOperatorsMixin):
    """`value`, and `error`, the bound on how far a computation with unit roundoff `unit` can be from it."""

    def __init__(self, value, error, unit, tiny=0.0):
        self.value, self.unit, self.tiny = np.asarray(value, float), unit, tiny
        self.error = np.broadcast_to(np.asarray(error, float), self.value.shape)

    def like(self, value, error):
        return Rounded(value, error, self.unit, self.tiny)

    @property
    def shape(self):
        return self.value.shape

    @property
    def mT(self):
        return self.like(self.value.mT, self.error.mT)

    def __getitem__(self, index):
        return self.like(self.value[index], self.error[index])

    def sum(self, axis):
        size = np.sum(np.abs(self.value) + self.error, axis)
        return self.like(np.sum(self.value, axis), np.sum(self.error, axis) + self.roundings(size, self.shape[axis]))

    def roundings(self, size, inner=0):
        """One of the result and so many more in float32."""
        return (self.unit + inner * INNER) * size + self.tiny

    def __array_ufunc__(self, ufunc, method, *inputs):
        if method != "__call__" or ufunc not in RULES:
            return NotImplemented
        owners = [a for a in inputs if isinstance(a, Rounded)]
        unit, tiny = min((a.unit, a.tiny) for a in owners)
        pairs = [(a.value, a.error) if isinstance(a, Rounded) else (np.asarray(a, float), 0.0) for a in inputs]
        value, propagated, size, inner = RULES[ufunc](*pairs)
        result = Rounded(value, propagated, unit, tiny)
        return result.like(value, propagated + result.roundings(size, inner))

    def __array_function__(self, func, types, args, kwargs):
        if func is np.where:
            condition, *branches = args
            owner = next(a for a in branches if isinstance(a, Rounded))
            values, errors = zip(*(parts(a) for a in branches), strict=True)
            return owner.like(np.where(condition, *values), np.where(condition, *errors))
        if func is np.concatenate:
            values, errors = zip(*(parts(a) for a in args[0]), strict=True)
            return args[0][0].like(np.concatenate(values, *args[1:]), np.concatenate(errors, *args[1:]))
        return NotImplemented


def parts(a):
    """Value and error."""
    return (a.value, a.error) if isinstance(a, Rounded) else (np.asarray(a, float), np.zeros(np.shape(a)))


def rule_sum(sign):
    def rule(left, right):
        (x, a), (y, b) = left, right
        return x + sign * y, a + b, np.abs(x) + np.abs(y) + a + b, 0

    return rule


def rule_product(left, right):
    (x, a), (y, b) = left, right
    return x * y, np.abs(x) * b + a * np.abs(y) + a * b, (np.abs(x) + a) * (np.abs(y) + b), 0


def rule_quotient(left, right):
    (x, a), (y, b) = left, right
    return x / y, (a + np.abs(x / y) * b) / (np.abs(y) - b), (np.abs(x) + a) / (np.abs(y) - b), 0


def rule_matmul(left, right):
    (x, a), (y, b) = left, right
    a, b = np.broadcast_to(a, x.shape), np.broadcast_to(b, y.shape)
    size = (np.abs(x) + a) @ (np.abs(y) + b)
    return x @ y, np.abs(x) @ b + a @ np.abs(y) + a @ b, size, x.shape[-1]


def rule_tanh(operand):
    x, a = operand
    y = np.tanh(x)
    return y, (1 - y * y) * a + a * a / 2, np.abs(y), FUNCTION


def rule_exp(operand):
    x, a = operand
    y = np.exp(x)
    return y, y * np.expm1(a), y * np.exp(a), FUNCTION


RULES = {
    np.add: rule_sum(1),
    np.subtract: rule_sum(-1),
    np.multiply: rule_product,
    np.divide: rule_quotient,
    np.matmul: rule_matmul,
    np.tanh: rule_tanh,
    np.exp: rule_exp,
    np.negative: lambda operand: (-operand[0], operand[1], 0.0, 0),
}


def exact_inputs(dtype):
    """Wraps arrays that a computation in this dtype receives without error."""
    return lambda array: Rounded(array, 0.0, UNITS[dtype], TINY[dtype])


def sum_in_float32():
    """The zero that losses and gradients add up from: sums are held in float32 at least."""
    return Rounded(0.0, 0.0, UNITS["float32"], TINY["float32"])
