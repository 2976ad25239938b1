"""How a command ends that cannot do what it was asked."""


class UsageError(Exception):
    """What the user can put right; its one line says how."""


def device_errors() -> tuple[type[Exception], ...]:
    """What JAX raises when a device gives up."""
    import jax

    return (jax.errors.JaxRuntimeError,)


def device_gave_up(error: Exception, remedy: str) -> UsageError:
    """Its first line, and what to try."""
    return UsageError(f"the device gave up: {str(error).splitlines()[0]}; try {remedy}")
