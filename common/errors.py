"""The one kind of error that is shown to users."""


class UserError(Exception):
    """A mistake the user can mend: one clear line on stderr, exit code 2."""
