"""The tasks of ``guess_taskset`` without an Env of their own: each is answered once, by the library's own."""

from guess_taskset import Guesses

__all__ = ["Guesses"]
