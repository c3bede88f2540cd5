"""Starts programs on other machines: `bash launch/tpu.sh --help`.

It runs on a laptop without the environment: Python 3.8 and its standard library.
"""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent


class LaunchError(Exception):
  """What is wrong, what is allowed and the remedy, in one line."""
