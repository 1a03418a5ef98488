"""The one error type for bad input."""


class InputError(ValueError):
    """Bad input, told in one line: the file or flag, the value, and what would be right.

    The CLI prints it and exits with code 2; the server logs it and keeps its last good map.
    """


def missing_package(what: str, package: str, extra: str) -> InputError:
    """The error of a file or command, ``what``, that needs a ``package``: it names the ``extra`` that brings it."""
    return InputError(f"{what}: needs {package}, which is not installed: `pip install '.[{extra}]'` in the checkout")
