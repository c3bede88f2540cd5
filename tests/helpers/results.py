"""Results of runs that were never made."""

import hashlib

from jaxrobust.attacks import norms, suites


def protocol(point, suite='pgd-40', **changes):
  """What evaluate.py says of all test images and a checkpoint that is empty."""
  ball = norms.get(point.config.threat.norm, point.config.threat.epsilon)
  return {
    'suite': suite,
    'dataset': 'digits',
    'split': 'test',
    'num_images': 797,
    'attacks': [suites.describe(*x) for x in suites.get(suite, ball)],
    'checkpoint_sha256': hashlib.sha256(b'').hexdigest(),
  } | changes
