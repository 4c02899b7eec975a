"""The version of this package, recorded in the files that it writes and sent with requests to the Hub."""

__version__ = "0.1.0"
