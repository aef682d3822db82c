class UserError(Exception):
    """A mistake the user can fix. Its message is one line that names the fix; the command line exits with 2."""
