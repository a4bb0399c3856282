"""The one error that a user of the command lines is meant to read."""


class InputError(ValueError):
    """Bad input: one sentence that names the value, its place and what is legal (exit code 2)."""
