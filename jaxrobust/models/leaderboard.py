"""What RobustBench's leaderboards want to know of a network beside its weights.

It is a file of JSON, model_info/DATASET/NORM/NAME.json in their repository
(https://github.com/RobustBench/robustbench, "Adding a new model").
"""

from jaxrobust.errors import UserError
from jaxrobust.models.card import Card

_DATASETS = ('cifar10', 'cifar100')  # that both know
_NORMS = {'linf': 'Linf', 'l2': 'L2'}
_FIELDS = (
  'link',
  'name',
  'authors',
  'additional_data',
  'number_forward_passes',
  'dataset',
  'venue',
  'architecture',
  'eps',
  'clean_acc',
  'reported',
  'autoattack_acc',
)
# What nothing here says.
UNKNOWN = ('link', 'name', 'authors', 'additional_data', 'venue', 'reported')


def model_info(card: Card) -> dict:
  """The fields of the file, in their order; None for those of UNKNOWN.

  Args:
    card: of a network that AutoAttack has judged on all test images.

  Raises:
    UserError: if there is no such evaluation, or no such leaderboard.
  """
  if card.dataset not in _DATASETS or card.norm not in _NORMS:
    raise UserError(
      f'{card.name} is of {card.dataset} and {card.norm}: RobustBench has leaderboards '
      f'of {" and ".join(_DATASETS)}, {" and ".join(_NORMS)}'
    )
  wanted = {
    'suite': 'autoattack',
    'dataset': card.dataset,
    'split': 'test',
    'num_images': card.info.test_size,
    'norm': card.norm,
    'epsilon': card.epsilon,
  }
  entry = next(
    (
      x
      for x in reversed(card.accuracies)
      if not x.get('published') and wanted.items() <= x['protocol'].items()
    ),
    None,
  )
  if entry is None:
    raise UserError(
      f'{card.name} has no evaluation of our own by AutoAttack on the '
      f'{card.info.test_size} test images of {card.dataset} with {card.norm} '
      f'{card.epsilon:.6g}: run jaxrobust evaluate --suite=autoattack, and convert its '
      'workdir'
    )
  percent = lambda fraction: f'{100 * fraction:.2f}'
  family, _, size = card.architecture.name.partition('-')
  known = {
    'number_forward_passes': 1,
    'dataset': card.dataset,
    'architecture': f'WideResNet-{size}' if family == 'wrn' else 'PreActResNet-18',
    'eps': _fraction(card.epsilon),
    'clean_acc': percent(entry['clean_accuracy']),
    'autoattack_acc': percent(entry['robust_accuracy']),
  }
  return {field: known.get(field) for field in _FIELDS}


def place(card: Card) -> str:
  """The folder of their repository that the file belongs in."""
  return f'model_info/{card.dataset}/{_NORMS[card.norm]}'


def _fraction(epsilon: float) -> str:
  """A radius as it is written there: 8/255, 0.5."""
  steps = round(255 * epsilon)
  if steps and abs(steps / 255 - epsilon) < 1e-9:
    return f'{steps}/255'
  return f'{epsilon:.6g}'
