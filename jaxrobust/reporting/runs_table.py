"""The classifiers' runs of a folder side by side: a line an experiment and protocol."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.attacks import suites
from jaxrobust.config import fields
from jaxrobust.files import json_files
from jaxrobust.runs import workdir as workdirs

# More differences than these are no name.
_MAX_FIELDS = 4
# What a line shows of an entry of results.json.
_JUDGED = {
  'protocol': {
    'suite': str,
    'norm': str,
    'epsilon': float,
    'split': str,
    'num_images': int,
  },
  'clean_accuracy': float,
  'robust_accuracy': float,
}


def find(folder: epath.Path) -> list[tuple[epath.Path, config_dict.ConfigDict]]:
  """(workdir, config) of the classifier's run that a folder is, or of those in it."""
  found = []
  for child in [folder, *sorted(folder.iterdir())]:
    if not workdirs.has_run(child):
      continue
    if 'training' in (config := workdirs.read_config(child)):
      found.append((child, config))
  return found


class Line(NamedTuple):
  """A line of the table of runs: one experiment by one protocol, over its seeds.

  Attributes:
    config: without its seed.
    folders: of its runs.
    protocol: of the evaluation, without what differs from seed to seed; None where it
      was not evaluated.
    entries: of results.json, by seed; the last one of a workdir counts.
  """

  config: config_dict.ConfigDict
  folders: list[epath.Path]
  protocol: dict | None
  entries: dict[int, Any]


def lines(runs: list[tuple[epath.Path, config_dict.ConfigDict]]) -> list[Line]:
  """The lines of a table of runs, those with results first.

  Runs are seeds of one experiment if their configs differ in nothing else.
  """
  found: dict[tuple[str, str], Line] = {}
  for folder, config in runs:
    results: list[dict | None] = [*workdirs.read_results(folder)]
    for entry in results or [None]:
      if entry:
        json_files.check(entry, str(folder / 'results.json'), _JUDGED)
      protocol = dict(entry['protocol']) if entry else None
      if protocol:
        protocol |= {'seed': None, 'checkpoint_sha256': None}
      same = configs.without_seed(config)
      line = found.setdefault(
        (configs.to_json(same), str(protocol)), Line(same, [], protocol, {})
      )
      line.entries[config.seed] = entry
      line.folders.append(folder)
  return sorted(found.values(), key=lambda line: line.protocol is None)


def names_of(found: list[Line]) -> list[str]:
  """The name of each line's experiment, and what sets apart those that share it.

  That is the fields in which their configs differ, or the folder where these are many
  or have no effect.
  """
  same_name = {}
  for line in found:
    same_name.setdefault(configs.experiment_name(line.config), []).append(line)
  names = {}
  for name, group in same_name.items():
    flat = [fields.flatten(line.config) | configs.unset(line.config) for line in group]
    ignored = set.intersection(*(configs.ignored(line.config) for line in group))
    differing = [
      x
      for x in sorted(flat[0].keys() - ignored)
      if len({str(f.get(x)) for f in flat}) > 1
    ]
    said = [
      ', '.join(f'{x}={_shown(x, f[x])}' for x in differing if x in f) for f in flat
    ]
    is_known = len(set(said)) == len(set(map(str, flat)))
    for line, differs in zip(group, said, strict=True):
      if not is_known or len(differing) > _MAX_FIELDS:
        differs = line.folders[0].name
      names[id(line)] = f'{name} ({differs})' if differs else name
  return [names[id(line)] for line in found]


def markdown(runs: list[tuple[epath.Path, config_dict.ConfigDict]]) -> str:
  """Markdown: a line an experiment and protocol, over its seeds; percent."""
  text = [
    '| experiment | data | seeds | clean | robust | suite | images |',
    '|---|---|---|---|---|---|---|',
  ]
  found = lines(runs)
  for name, line in zip(names_of(found), found, strict=True):
    data, protocol = line.config.data, line.protocol
    states = dict.fromkeys(filter(None, map(workdirs.how_far, line.folders)))
    cells = ['–', '–', '; '.join(states) or 'not evaluated', '–']
    if protocol:
      cells = [
        _percent(line.entries.values(), 'clean_accuracy'),
        '–'
        if protocol['suite'] == suites.CLEAN
        else _percent(line.entries.values(), 'robust_accuracy'),
        f'{protocol["suite"]}, {protocol["norm"]} {_radius(protocol["epsilon"])}',
        f'{protocol["num_images"]} {protocol["split"]}',
      ]
    if protocol and 'checkpoint_step' in protocol:
      name += f' at step {protocol["checkpoint_step"]}'
    share = f'{data.real_fraction:.0%} real' if data.samples else 'real'
    text.append(f'| {" | ".join([name, share, str(len(line.entries)), *cells])} |')
  return '\n'.join(text) + '\n'


def _shown(path: str, value: object) -> str:
  """A field's value in a name."""
  if path == 'threat.epsilon' and isinstance(value, float):
    return _radius(value)
  is_long = isinstance(value, float) and len(str(value)) > 6
  return f'{value:.4g}' if is_long else str(value)


def _radius(epsilon: float) -> str:
  """In few decimals, or in 255ths where these say it exactly and decimals do not."""
  text, levels = f'{epsilon:.4g}', round(255 * epsilon)
  in_levels = levels and abs(255 * epsilon - levels) < 1e-6
  return f'{levels}/255' if in_levels and float(text) != epsilon else text


def _percent(entries: Iterable[dict], field: str) -> str:
  """Mean over seeds in percent, with the sample standard deviation."""
  values = [100 * entry[field] for entry in entries]
  mean = f'{statistics.mean(values):.2f}'
  return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean
