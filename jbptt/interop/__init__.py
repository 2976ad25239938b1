"""Models of Flax, Haiku and Equinox as what jbptt takes: `(step, params, initial_carry)`.

`step(params, carry, x) -> (carry, y)` is pure. `params` is the library's own tree of what is
trained, so gradients have its structure and go where the library's optimizers want them.
`initial_carry(batch_shape=())` is the module's own, or what `initial_carry=` says: the carry of one
example, or a function of the batch shape.

A module is called as `module(carry, x) -> (carry, y)` (a Haiku core as
`core(x, carry) -> (y, carry)`); every other way is said with `call=`, a function
`(module, carry, x) -> (carry, y)`. Where a module draws random numbers (dropout), its keys travel
in the carry, `(the module's carry, keys)`: the step stays pure, and a masked step draws nothing.

The way back: `to_nnx`, `to_equinox`. For linen, gradients and parameters are what stands at
`variables["params"]`: `{**variables, "params": params}`; for Haiku they are its own parameters.
"""

from jbptt.interop.equinox import from_equinox, to_equinox
from jbptt.interop.haiku import from_haiku
from jbptt.interop.linen import from_linen
from jbptt.interop.nnx import from_nnx, to_nnx
