"""The one exception class for mistakes a user can correct."""


class MixMoEError(ValueError):
    """Bad input or a wrong request, told in one clear sentence; commands print it and exit with status 2."""
