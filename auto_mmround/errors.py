"""The one exception that means: the user's input is wrong."""


class UserError(Exception):
    """One line for the user: what is wrong, where, and what to do. The command line prints it and exits with 2."""
