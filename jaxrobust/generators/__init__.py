"""Generators, fitted to the training images only.

A generator is an object with
  `check(settings)` (a static method): raises UserError for settings that cannot be
    meant, before anything is written;
  `fit(images, labels, num_classes, settings)` (a class method): fits and returns it;
  `sample(rng, indices)`: images uint8 [n, H, W, C] and the classes they were drawn
    for, int32 [n]; sample i depends on (rng, i) only;
  `save(path)` and `restore(path)` (a class method).

To add one, write its module and name it in `GENERATORS`.
"""

from jaxrobust.errors import UserError
from jaxrobust.generators import gaussian

GENERATORS = {'gaussian': gaussian.Gaussian}


def get(name: str):
  """The generator's class; UserError for an unknown name."""
  if name not in GENERATORS:
    raise UserError(
      f'config.generator.name = {name!r}: use one of {", ".join(GENERATORS)}'
    )
  return GENERATORS[name]
