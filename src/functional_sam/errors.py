"""The exceptions that a user is meant to read."""

RESUMABLE = 75  # exit code of the command line for Interrupted, EX_TEMPFAIL of sysexits.h; a batch script requeues its job on it


class UserError(ValueError):
    """Bad input: the message names the value, the place and the way out. The command line prints it alone and exits with 2."""


class Interrupted(Exception):
    """A signal ended the work; nothing is lost, and the message says how to go on. The command line prints it and exits with 75."""
