"""Many runs of one function in one call: batched, kept, divided over devices and workers."""
