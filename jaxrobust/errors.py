"""The one exception for what a user did, told without a traceback."""


class UserError(ValueError):
  """Bad input: one line with the value, what is allowed and the remedy.

  Programs print it as `error: …` and exit with 1. Used from Python, it is a
  `ValueError` like any other.
  """
