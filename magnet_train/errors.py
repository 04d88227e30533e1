"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the file or option, its value and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """
