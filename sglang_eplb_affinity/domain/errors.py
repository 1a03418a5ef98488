"""The one error type for bad input."""


class InputError(ValueError):
    """Bad input, told in one line: the file or flag, the value, and what would be right.

    The CLI prints it and exits with code 2; the server logs it and keeps its last good map.
    """
