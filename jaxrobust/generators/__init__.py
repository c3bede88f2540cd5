"""Generators, fitted to the training images only.

A generator is an object with
  `check(settings, info, fits=)` (a static method): raises UserError for settings that
    cannot be meant for this data set, of another generator too, and where the run fits
    for what these devices cannot fit, before anything is written;
  `conditional(settings)` (static too): whether its samples are drawn for classes, by
    settings that were checked;
  `fit(real, info, settings, folder=, seed=)` (a class method): fits and returns it; one
    that trains keeps its checkpoints in `folder` and goes on from there; every
    process of a run calls it;
  `sample(rng, indices, batch_size)`: images uint8 [n, H, W, C] and the classes they
    were drawn for, int32 [n], -1 where for none; sample i depends on (rng, i) only, and
    on batch_size, the images on a device at a time, by rounding. The processes of a run
    call it each with numbers of its own, so it uses the local devices only;
  `save(path)`, and `restore(path, settings, info)` (a class method).
`settings` is `config.generator`, `info` the data set's DatasetInfo.

To add one, write its module, name it in `GENERATORS`, and its fields in
`experiments/base_generator.py`.
"""

from jaxrobust.errors import UserError
from jaxrobust.generators import ddpm, gaussian, mixup

GENERATORS = {'gaussian': gaussian.Gaussian, 'ddpm': ddpm.DDPM, 'mixup': mixup.Mixup}


def get(name: str):
  """The generator's class; UserError for an unknown name."""
  if name not in GENERATORS:
    raise UserError(
      f'config.generator.name = {name!r}: use one of {", ".join(GENERATORS)}'
    )
  return GENERATORS[name]
