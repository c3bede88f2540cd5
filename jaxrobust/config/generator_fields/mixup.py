"""Settings of mixup."""

from jaxrobust.config.fields import field

FIELDS = {
  'name': field('mixup', 'mixes of two training images'),
  'alpha': field(1.0, "of the ratio's Beta(alpha, alpha); 1 is uniform", above=0),
}
