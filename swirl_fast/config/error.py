"""ConfigError, in a module of its own because every other module here raises it."""


class ConfigError(ValueError):
    """A setting that cannot work: names the key, the value and the remedy."""
