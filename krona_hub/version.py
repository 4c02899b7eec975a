"""The version of this package: what files that it writes record as their maker, and what it tells the Hub."""

__version__ = "0.1.0"
