"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input: the message names the value, the place and the way out. The command line prints it alone and exits with 2."""
