"""Convert: one adapter in another format, or as a program reads it, the same updates to the last digit of the type."""

from lorastack.converting.new_file import convert, fitting

__all__ = ["convert", "fitting"]
