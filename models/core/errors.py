"""Errors that a user can do something about: one clear line, no traceback on the command line."""


class ZooError(Exception):
    """Something went wrong that is not a mistake in the program: a bad file, a full disk, a NaN."""


class UsageError(ZooError):
    """A request that cannot be met as it stands: an unknown name, an impossible setting."""
