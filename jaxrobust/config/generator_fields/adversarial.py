"""Settings that generators with a discriminator share."""

from jaxrobust.config.fields import field

AUGMENTATION = {
  'kind': field(
    'bgc',
    'what the discriminator sees changed: bgc, all that moves pixels or changes '
    'colours; upright, the same without mirrors, turns and rotations; DiffAugment, '
    'with or without its colours, which has no probability; or none',
    choices=('none', 'bgc', 'upright', 'diff-augment', 'diff-augment-colour'),
  ),
  'probability': field(
    0.0, 'of each change, at first; always, where target is 0', least=0, most=1
  ),
  'target': field(
    0.6,
    'mean sign of logits of real images at which the probability is kept; 0 for one '
    'that stays',
    least=0,
    most=1,
  ),
  'interval_steps': field(4, 'iterations between two changes of it', above=0),
  'ramp_images': field(500_000, 'in which it can rise from 0 to 1', above=0),
}
FID = {
  'interval_steps': field(
    0, 'iterations between two measurements; 0 for none', least=0, free=True
  ),
  'samples': field(10_000, 'compared with all training images', above=1, free=True),
  'features': field(
    '',
    "what the distance is of: a classifier's penultimate layer (a workdir, a file "
    "with its card or a released name), lpips:FILE, or '' for pixels in [0, 1]",
    free=True,
  ),
}
