"""Which numbers of the carry each parameter reaches: in one step, in n, in any number of steps."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jbptt.arrays import is_inexact
from jbptt.engine import entry_dependence
from jbptt.online.examples import advances, carry_size, is_own, sample
from jbptt.problem import Problem, problem_of
from jbptt.types import Batch, Loss, Params, Step

WHY = "each example has an influence of its own"
NUM_DRAWS = 4


@dataclass(frozen=True)
class InfluenceStructure:
    """What a step of one example reads, number by number; `str()` says what influences take.

    Sets of carry entries are integers, bit i for entry i. Complex leaves count as their real and
    imaginary parts.

    Attributes:
      size: n, the real numbers in the carry of one example, without leaves that no loss reads.
      sets: the sets that occur.
      params: for each real leaf of the parameters, in its shape, which set of the emitted carry its
        numbers enter in one step.
      carry: the same for the entries of the carry received, `[n]`.
    """

    size: int
    sets: list[int]
    params: list[np.ndarray]
    carry: np.ndarray

    @property
    def is_elementwise(self) -> bool:
        """Whether every number of the carry reads itself alone, if anything."""
        return all(self.sets[number] & ~(1 << i) == 0 for i, number in enumerate(self.carry))

    def after(self, order: int | None) -> tuple[list[int], list[np.ndarray], np.ndarray]:
        """What is reached within `order` steps, None: ever.

        Returns sets, and numbers of them as in `params` and `carry`. Within one step a parameter
        reaches what it enters, an entry of the carry itself.
        """
        steps = [self.sets[number] for number in self.carry]
        if order is None:
            # Twice as many steps in every round.
            reached = [bits | 1 << i for i, bits in enumerate(steps)]
            while (further := _united(reached, reached)) != reached:
                reached = further
            known = _united(self.sets, reached)
            carry = reached
        else:
            known, carry = list(self.sets), [1 << i for i in range(self.size)]
            for _ in range(order - 1):
                before = known, carry
                known, carry = _united(known, steps), _united(carry, steps)
                if before == (known, carry):
                    break
        sets: dict[int, int] = {}

        def numbered(bits):
            return np.array([sets.setdefault(each, len(sets)) for each in bits], np.int64)

        numbers, of_carry = numbered(known), numbered(carry)  # they share the sets
        params = [numbers[of_leaf] for of_leaf in self.params]
        return list(sets), params, of_carry

    def with_padding(self) -> "InfluenceStructure":
        """The same where padding holds the carry: every number feeds itself, too."""
        sets = {bits: number for number, bits in enumerate(self.sets)}
        held = [self.sets[number] | 1 << i for i, number in enumerate(self.carry)]
        carry = [sets.setdefault(bits, len(sets)) for bits in held]
        return replace(self, sets=list(sets), carry=np.array(carry, np.int64))

    def num_kept(self, order: int | None) -> int:
        """Numbers of influence of one example that `order` steps make other than zero; None: any.

        A leaf's numbers are kept in as many places as that which reaches most.
        """
        sets, params, _ = self.after(order)
        return sum(
            leaf.size * max((sets[number].bit_count() for number in np.unique(leaf)), default=0)
            for leaf in params
        )

    def num_kept_of_carry(self, order: int | None) -> int:
        """The same of the carry that enters an update, which `info["carry_grads"]` is read off."""
        sets, _, carry = self.after(order)
        return self.size * max((sets[number].bit_count() for number in carry), default=0)

    def __str__(self):
        num_params = sum(leaf.size for leaf in self.params)
        most = max((self.sets[number].bit_count() for number in self.carry), default=0)
        own = f"of each example's carry losses read {self.size:,} numbers"
        lines = [f"{num_params:,} parameters; {own}"]
        if self.is_elementwise:
            lines.append("every number of the carry feeds itself alone")
        else:
            lines.append(f"a number of the carry feeds at most {most:,} of the next")
        lines.append("influence kept for each example, in numbers:")
        rows = [("SnAp-1, RFLO", 1), ("SnAp-2", 2), ("RTRL", None)]
        counts = {name: self.num_kept(order) for name, order in rows}
        counts["UORO"] = num_params + self.size
        width = max(len(f"{count:,}") for count in counts.values())
        lines += [f"  {name:<12}  {count:>{width},}" for name, count in counts.items()]
        return "\n".join(lines)


def influence_structure(
    step: Step,
    loss: Loss,
    params: Params,
    carry: Any,
    batch: Batch,
    *,
    method: Literal["program", "numbers"] = "program",
) -> InfluenceStructure:
    """Which parameters reach which numbers of the carry, as `rtrl` and `snap` find it.

    Print it before an influence is carried along: it says how many numbers each estimator keeps.

    Args:
      step, loss, params, carry, batch: as an estimator takes them.
      method: "program" reads the program of the step's derivative, on shapes, and never leaves out
        what may be other than zero; what the program multiplies by zeros (a diagonal matrix that is
        written out) counts. "numbers" takes for zero what is zero at four random choices of
        parameters, carries and inputs; integers and keys are those of the batch's first steps. A
        relu unit or a spiking one may be silent at all four: hand the structure to
        `rtrl(…, structure=…)` only if you know that what it leaves out is always zero.

    Raises:
      ValueError: another method; what `full_bptt` raises.

    >>> def step(params, h, x):
    ...     h = params["decay"] * h + x @ params["w"]
    ...     return h, h
    >>> params = {"decay": jnp.ones(3), "w": jnp.ones((2, 3))}
    >>> loss, batch = (lambda y, target: jnp.sum(y, -1)), Batch(jnp.ones((5, 1, 2)))
    >>> print(influence_structure(step, loss, params, jnp.zeros((1, 3)), batch))
    9 parameters; of each example's carry losses read 3 numbers
    every number of the carry feeds itself alone
    influence kept for each example, in numbers:
      SnAp-1, RFLO   9
      SnAp-2         9
      RTRL           9
      UORO          12
    """
    ways = {"program": structure_of, "numbers": _measured}
    if method not in ways:
        raise ValueError(f"method must be one of {', '.join(ways)}, got {method!r}")
    return ways[method](problem_of(step, loss, params, carry, batch, per_example=WHY))


def _united(sets: list[int], steps: list[int]) -> list[int]:
    """Each set, with the sets that its entries lead to."""
    found: dict[int, int] = {}
    for bits in sets:
        if bits not in found:
            united, rest = bits, bits
            while rest:
                lowest = rest & -rest
                united |= steps[lowest.bit_length() - 1]
                rest ^= lowest
            found[bits] = united
    return [found[bits] for bits in sets]


def structure_of(problem: Problem) -> InfluenceStructure:
    """Read off the program of the step's derivative; nothing runs."""
    sets, (params, received) = entry_dependence(
        partial(_way_back, problem), _emitted(problem), problem.params, *sample(problem)
    )
    return InfluenceStructure(carry_size(problem), sets, params, received)


def _way_back(problem: Problem, bar: jax.Array, params: Params, carry: Any, inputs: Any):
    """Cotangents of the real leaves and of the carry received, from those of the carry emitted."""
    return advances(replace(problem, params=params))(carry, inputs).pullback()[1](bar)


def _emitted(problem: Problem) -> jax.ShapeDtypeStruct:
    """The carry that a step of one example emits, as a vector's shape."""
    advance_of = advances(problem)
    return jax.eval_shape(lambda *given: advance_of(*given).pullback()[0], *sample(problem))


def _measured(problem: Problem) -> InfluenceStructure:
    """What is other than zero at some of a few random parameters, carries and inputs."""
    rng, shape, size = np.random.default_rng(0), problem.batch_shape, carry_size(problem)
    bars = jnp.eye(size, dtype=_emitted(problem).dtype)

    def drawn(leaf):
        if not is_inexact(leaf):
            return leaf
        real, imaginary = rng.normal(size=(2, *np.shape(leaf)))
        of_dtype = real + 1j * imaginary if jnp.iscomplexobj(leaf) else real
        return jnp.asarray(of_dtype, jnp.result_type(leaf))

    def first(leaf):
        return leaf[(0,) * len(shape)] if is_own(leaf, shape) else leaf

    @jax.jit
    def rows(params, carry, inputs):
        return jax.vmap(lambda bar: _way_back(unmasked, bar, params, carry, inputs))(bars)

    unmasked, found = problem.on(problem.carry, problem.batch._replace(mask=None)), None
    for number in range(NUM_DRAWS):
        at = number % problem.num_steps
        inputs = jax.tree.map(lambda leaf, at=at: first(leaf[at]), unmasked.inputs)
        given = problem.params, jax.tree.map(first, problem.carry), inputs
        nonzero = jax.tree.map(lambda a: np.asarray(a) != 0, rows(*jax.tree.map(drawn, given)))
        found = nonzero if found is None else jax.tree.map(np.logical_or, found, nonzero)
    assert found is not None  # some are drawn
    sets: dict[int, int] = {0: 0}

    def numbers(reads):
        """`[n, *leaf]` bools as numbers of sets, in the leaf's shape."""
        packed = np.packbits(reads.reshape(size, -1).T, axis=1, bitorder="little")
        bits = [int.from_bytes(row.tobytes(), "little") for row in packed]
        numbered = [sets.setdefault(of_one, len(sets)) for of_one in bits]
        return np.array(numbered, np.int64).reshape(reads.shape[1:])

    params, received = [numbers(leaf) for leaf in found[0]], numbers(found[1])
    structure = InfluenceStructure(size, list(sets), params, received)
    return structure if problem.batch.mask is None else structure.with_padding()
