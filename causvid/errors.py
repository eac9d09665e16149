"""The one error that is a person's and not the program's."""


class UserError(ValueError):
    """Bad input from a person: printed as one message, exit status 2, never a traceback."""
