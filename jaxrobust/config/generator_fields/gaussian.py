"""Settings of the class-conditional Gaussian."""

from jaxrobust.config.fields import field

FIELDS = {
  'name': field('gaussian', 'one normal distribution a class'),
  'covariance': field(
    'empirical',
    'how it is estimated',
    choices=('empirical', 'ledoit-wolf', 'oas', 'low-rank'),
  ),
  'rank': field(64, 'principal components of low-rank, not used by the others'),
}
