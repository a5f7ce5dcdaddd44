"""What is wrong with what the user asked for."""


class InputError(ValueError):
    """A model or data set that the user named, or a default, cannot be had; the message says what to do."""
