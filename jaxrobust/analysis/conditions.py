"""The three conditions under which generated data helps: verdicts, page and figures.

Source: Gowal et al. 2021: (a) pseudo-labels are accurate; (b) generated and real images
are distributed alike, or attacks on generated images are unlikely to flip the labels of
the classifier that gave them; (c) generated images cover the real ones. The paper gives
no numbers to decide by: the rules are this program's, and stand in the config.
"""

import io

import numpy as np

from jaxrobust.analysis.complementarity import SETS, Neighbours

_SHOWN = 10  # images in a row
_COLORS = dict(zip(SETS, ('C0', 'C2', 'C1'), strict=True))


_WORDS = {True: 'met', False: 'NOT met', None: 'undecided'}


def verdicts(figures: dict, rules: dict[str, float]) -> dict[str, bool | None]:
  """Which conditions are met.

  Args:
    figures: of an analysis, as in its results.json.
    rules: `config.rules`.

  Returns:
    'labels' (a), 'distribution' (b) and 'coverage' (c). None for (b) where labels are
    easy to flip, and the two-sample test within two standard errors of its rule: few
    images cannot decide.
  """
  accuracies = [figures['labeller_test_accuracy'], figures['label_agreement']]
  if figures['agreement_with_condition'] is not None:
    accuracies.append(figures['agreement_with_condition'])
  over = figures['two_sample_accuracy'] - rules['most_two_sample_accuracy']
  alike = None if abs(over) <= 2 * figures['two_sample_standard_error'] else over < 0
  return {
    'labels': min(accuracies) >= rules['least_accuracy'],
    'distribution': figures['flip_rate_generated'] <= rules['most_flips'] or alike,
    'coverage': figures['coverage_test'] >= rules['least_coverage'],
  }


def memorises(figures: dict, num_images: int) -> bool:
  """Whether generated images lie nearer to training than to test images.

  A generator that repeats no training image is as near to the one as to the other. The
  rule: of the generated images whose nearest is a real one, more than half have a
  training image there, by more than two standard errors of a fair coin.

  Args:
    figures: of an analysis.
    num_images: generated images compared.
  """
  train, test = figures['nearest_train'], figures['nearest_test']
  return train - test > 2 * ((train + test) / num_images) ** 0.5


def page(entry: dict) -> str:
  """What an analysis found, to be read.

  Args:
    entry: of its results.json.
  """
  protocol = entry['protocol']
  rules, threat = protocol['rules'], protocol['threat']
  met = {name: _WORDS[met] for name, met in entry['verdicts'].items()}
  percent = {k: f'{x:.2%}' for k, x in entry.items() if isinstance(x, float)}
  least, coverage = rules['least_accuracy'], rules['least_coverage']
  apart, flips = rules['most_two_sample_accuracy'], rules['most_flips']
  agrees = percent['label_agreement']
  if entry['labelled_by_labeller']:
    agrees += ' (it gave them, so this says nothing)'
  drawn_for = percent.get('agreement_with_condition', 'not known, or none')
  lines = [
    f'{protocol["samples"]} beside {protocol["dataset"]["name"]}',
    f'  compared: {protocol["num_images"]} images each of train, test and generated',
    f'  attacked: {protocol["num_attacked"]} each of test and generated',
    f'  features: {entry["network"]}, {entry["num_features"]} of each image',
    f'(a) accurate pseudo-labels: {met["labels"]}',
    f'  mean confidence: generated {percent["mean_confidence"]}, '
    f'test {percent["mean_confidence_test"]}',
    f'  labeller right on test images: {percent["labeller_test_accuracy"]}',
    f"  labeller agrees with the set's labels: {agrees}",
    f'  labels agree with the classes that samples were drawn for: {drawn_for}',
    f'  rule: each of these accuracies at least {least:.0%}',
    f'(b) distributed alike, or hard to flip: {met["distribution"]}',
    f'  generated distinguished from test images: {percent["two_sample_accuracy"]} ± '
    f'{percent["two_sample_standard_error"]} (alike: 50 %)',
    f'  FID to train: generated {entry["fid"]:.4g}, test {entry["fid_test"]:.4g}',
    f'  flipped by the attack ({threat["norm"]} {threat["epsilon"]:.4g}): generated '
    f'{percent["flip_rate_generated"]}, test {percent["flip_rate_test"]}',
    f'  rule: distinguished at most {apart:.0%}, or flipped at most {flips:.0%}; '
    'undecided within two standard errors of the former',
    f'(c) coverage of real images: {met["coverage"]}',
    f'  nearest to generated images: train {percent["nearest_train"]}, test '
    f'{percent["nearest_test"]}, itself {percent["nearest_itself"]} (alike: a third)',
    f'  coverage: train {percent["coverage_train"]}, test {percent["coverage_test"]} '
    '(alike: 50 %)',
    f'  rule: coverage of test at least {coverage:.0%}',
    *_said_of_memorisation(entry, percent),
    "The rules are this program's, not the paper's.",
  ]
  return '\n'.join(lines) + '\n'


def _said_of_memorisation(entry: dict, percent: dict) -> list[str]:
  """A line where samples are nearer to training than to test images; else none."""
  if not memorises(entry, entry['protocol']['num_images']):
    return []
  return [
    f'memorisation: samples lie nearer to training ({percent["nearest_train"]}) than '
    f'to test images ({percent["nearest_test"]}), by more than two standard errors'
  ]


def draw(figures: dict, protocol: dict, confidences: dict[str, np.ndarray]) -> bytes:
  """A PNG with a panel for each condition.

  Args:
    figures: of an analysis, with verdicts.
    protocol: of its entry.
    confidences: of the labeller in 'test' and 'generated' images, [n] in [0, 1].
  """
  met, least = figures['verdicts'], protocol['rules']['least_coverage']
  # Imported here, as no help page needs it.
  from matplotlib import figure, ticker

  fig = figure.Figure(figsize=(12, 3.6), layout='constrained')
  axes = dict(zip(met, fig.subplots(1, 3, width_ratios=(1, 1, 1.3)), strict=True))
  for name, title in (
    ('labels', '(a) accurate pseudo-labels'),
    ('distribution', '(b) alike, or hard to flip'),
    ('coverage', '(c) coverage of real images'),
  ):
    axes[name].set_title(f'{title}: {_WORDS[met[name]].lower()}', fontsize=10)
    axes[name].yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    axes[name].grid(alpha=0.3)
    axes[name].set_axisbelow(True)
  for name, values in confidences.items():
    axes['labels'].hist(
      values,
      np.linspace(0, 1, 21),
      weights=np.full(len(values), 1 / len(values)),
      histtype='step',
      color=_COLORS[name],
      label=f'{name}, mean {values.mean():.1%}',
    )
  axes['labels'].legend(fontsize=8, loc='upper left')
  axes['labels'].set_ylabel("share of images by labeller's confidence", fontsize=8)
  axes['labels'].set_xlabel(
    f'labeller right on test images {figures["labeller_test_accuracy"]:.1%}, '
    f'\nagrees with the labels of the set {figures["label_agreement"]:.1%}',
    fontsize=8,
  )
  _bars(
    axes['distribution'],
    [
      ('distinguished\nfrom test', figures['two_sample_accuracy'], 'generated', 0.5),
      ('flipped:\ngenerated', figures['flip_rate_generated'], 'generated', None),
      ('flipped:\ntest', figures['flip_rate_test'], 'test', None),
    ],
    f'FID to train {figures["fid"]:.3g} (test images: {figures["fid_test"]:.3g})',
  )
  _bars(
    axes['coverage'],
    [
      ('nearest:\ntrain', figures['nearest_train'], 'train', 1 / 3),
      ('nearest:\ntest', figures['nearest_test'], 'test', 1 / 3),
      ('nearest:\nitself', figures['nearest_itself'], 'generated', 1 / 3),
      ('coverage:\ntrain', figures['coverage_train'], 'train', 0.5),
      ('coverage:\ntest', figures['coverage_test'], 'test', 0.5),
    ],
    f'dashed: alike; rule: coverage of test at least {least:.0%}',
  )
  return _png(fig)


def draw_neighbours(images: dict[str, np.ndarray], neighbours: Neighbours) -> bytes:
  """A PNG: generated images above their nearest in each set, the nearest framed.

  Args:
    images: uint8 [n, H, W, C] of each of SETS.
    neighbours: of the generated images.
  """
  # Evenly over all distances, from the nearest to the furthest.
  order = np.argsort(neighbours.distances.min(1), kind='stable')
  shown = order[np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).astype(int)]
  rows = [('generated', images['generated'][shown])]
  rows += [
    (f'nearest {"other generated" if name == "generated" else name}', images[name][i])
    for name, i in zip(SETS, neighbours.indices[shown].T, strict=True)
  ]
  nearest = 1 + neighbours.distances[shown].argmin(1)
  from matplotlib import figure

  fig = figure.Figure(figsize=(11, 1.05 * len(rows)), layout='constrained')
  grid = fig.subplots(len(rows), len(shown), squeeze=False)
  for number, (axes, (title, row)) in enumerate(zip(grid, rows, strict=True)):
    for axis, image, framed in zip(axes, row, nearest == number, strict=True):
      axis.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
      axis.set(xticks=[], yticks=[])
      if framed:
        for side in axis.spines.values():
          side.set(color=_COLORS[SETS[number - 1]], linewidth=4)
    axes[0].set_ylabel(title, rotation=0, ha='right', va='center', fontsize=8)
  return _png(fig)


def _png(fig) -> bytes:
  """A figure as a file."""
  buffer = io.BytesIO()
  fig.savefig(buffer, format='png', dpi=110)
  return buffer.getvalue()


def _bars(axis, bars, below: str):
  """Bars (name, share, set, share if alike or None), and a line of text below."""
  for position, (_, share, name, alike) in enumerate(bars):
    axis.bar(position, share, color=_COLORS[name])
    # Above the dashed line where it would cross the number.
    above = alike if alike and alike - 0.08 < share < alike else share
    axis.text(position, above, f'{share:.1%}', ha='center', va='bottom', fontsize=8)
    if alike:
      axis.plot([position - 0.5, position + 0.5], [alike] * 2, 'k--', linewidth=1)
  axis.set_xticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
  axis.set_xlabel(below, fontsize=8)
  axis.set_ylim(0, 1.1)
