"""The errors that users are meant to read."""


class InputError(ValueError):
    """An input that the user can mend. The message says what, where, and what to do."""
