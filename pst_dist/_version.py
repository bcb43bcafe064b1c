"""The version, in a module of its own so that no layer has to import the package's top for it."""

__version__ = "0.1.0"
