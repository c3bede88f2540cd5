"""Checkpoints on the Hugging Face hub, written hf:OWNER/NAME.

A repository there has

  model.safetensors   the parameters, with the model card inside
  model.json          the model card, for other programs
  README.md           the same for people, and for the hub's lists and tables

Only `hf:` needs the package huggingface_hub, which also knows who may read and write.
"""

import json
import re
import tempfile
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.models.card import Card, has_attack

PREFIX = 'hf:'
FILE = 'model.safetensors'
_INSTALL = "install it (from a clone: pip install '.[hub]')"
# Names of errors of requests, httpx, the system and huggingface_hub, none of which need
# be installed.
_NO_CONNECTION = {
  *('ConnectionError', 'Timeout', 'TransportError', 'TimeoutError', 'gaierror'),
  *('LocalEntryNotFoundError', 'OfflineModeIsEnabled'),
}
_README = """---
{front}---

# {card.name}

A {card.architecture.name} of {card.dataset} (images {images}, {classes} classes),
trained to be robust in the {card.norm} ball of radius {card.epsilon:.6g} (pixels in
[0, 1]).

```python
import jaxrobust

classifier = jaxrobust.load('hf:{repository}')
logits = classifier(images)  # uint8, or float in [0, 1]
```

{table}
- activation: {card.model[activation]}
- normalisation: mean {card.model[mean]}, standard deviation {card.model[std]}, padding
  {card.model[padding]}, which are part of the network
- parameters from: {card.source}
- sha256 of the training run's config: {card.config_sha256}
"""
_HEAD = """| judged by | images | norm | epsilon | clean | robust |
| --- | --- | --- | --- | --- | --- |
"""


def is_hub(path: str) -> bool:
  """Whether a path is on the hub."""
  return path.startswith(PREFIX)


def fetch(path: str) -> epath.Path:
  """The file of a repository, on this machine.

  Args:
    path: hf:OWNER/NAME.

  Raises:
    UserError: without huggingface_hub; if the repository or its file is absent, or
      cannot be reached.
  """
  hub, repository = _package(path), _repository(path)
  try:
    return epath.Path(hub.hf_hub_download(repo_id=repository, filename=FILE))
  except Exception as e:  # Also those of the libraries that it reaches the hub by.
    raise UserError(
      f'{path}: {FILE} cannot be fetched ({_one_line(e)}): {_remedy(e)}'
    ) from e


def publish(path: str, card: Card, export: Callable[[epath.Path], Any]) -> Any:
  """Writes a checkpoint to a repository, which is made if absent.

  What the repository had before stays in its history.

  Args:
    path: hf:OWNER/NAME.
    card: of the checkpoint.
    export: writes a file of parameters, given its path.

  Returns:
    What `export` returns.

  Raises:
    UserError: without huggingface_hub; if the hub refuses, or cannot be reached.
  """
  hub, repository = _package(path), _repository(path)
  with tempfile.TemporaryDirectory() as name:
    folder = epath.Path(name)
    exported = export(folder / FILE)
    (folder / 'model.json').write_text(card.to_json())
    (folder / 'README.md').write_text(readme(card, repository))
    try:
      api = hub.HfApi()
      api.create_repo(repo_id=repository, exist_ok=True)
      api.upload_folder(
        repo_id=repository,
        folder_path=name,
        commit_message=f'Add {card.name}',
      )
    except Exception as e:  # As above.
      raise UserError(f'{path} cannot be written ({_one_line(e)}): {_remedy(e)}') from e
  return exported


def readme(card: Card, repository: str) -> str:
  """The model card as the hub shows it: its facts and figures, and how to use it.

  It has no license: that is for whoever publishes to say.

  Args:
    card: of the checkpoint.
    repository: OWNER/NAME.
  """
  facts = {
    'library_name': 'jaxrobust',
    'pipeline_tag': 'image-classification',
    'tags': ['adversarial-robustness', 'haiku', 'jax', card.norm],
    'model-index': [
      {'name': card.name, 'results': [_result(entry) for entry in card.accuracies]}
    ],
  }
  # A value of JSON is one of YAML.
  front = ''.join(f'{key}: {json.dumps(value)}\n' for key, value in facts.items())
  info = card.info
  height, width, channels = info.image_shape
  rows = ''.join(map(_row, card.accuracies))
  table = f'{_HEAD}{rows}' if rows else 'It has not been judged yet.\n'
  return _README.format(
    front=front,
    card=card,
    repository=repository,
    images=f'{height}x{width}x{channels}',
    classes=info.num_classes,
    table=table,
  )


def _row(entry: dict) -> str:
  """An evaluation as a row of the table."""
  protocol = entry['protocol']
  source = f' ({entry["published"]})' if entry.get('published') else ''
  cells = (
    f'{protocol.get("suite")}{source}',
    f'{protocol.get("num_images")} {protocol.get("split")}',
    protocol.get('norm'),
    f'{protocol.get("epsilon", float("nan")):.6g}',
    f'{entry["clean_accuracy"]:.2%}',
    f'{entry["robust_accuracy"]:.2%}' if has_attack(entry) else '–',
  )
  return f'| {" | ".join(map(str, cells))} |\n'


def _result(entry: dict) -> dict:
  """An evaluation as the hub's tables take it."""
  protocol = entry['protocol']
  robust = (
    f'robust accuracy, {protocol.get("suite")}, {protocol.get("norm")} '
    f'{protocol.get("epsilon", float("nan")):.6g}'
  )
  dataset = protocol.get('dataset')
  return {
    'task': {'type': 'image-classification'},
    'dataset': {'name': dataset, 'type': dataset, 'split': protocol.get('split')},
    'metrics': [
      {'type': 'accuracy', 'name': name, 'value': round(value, 4)}
      for name, value in (
        ('clean accuracy', entry['clean_accuracy']),
        (robust, entry['robust_accuracy']),
      )[: 1 + has_attack(entry)]
    ],
  }


def _package(path: str):
  """The package, which is optional."""
  try:
    import huggingface_hub
  except ImportError as e:
    raise UserError(f'{path} needs the package huggingface_hub: {_INSTALL}') from e
  return huggingface_hub


def _repository(path: str) -> str:
  """OWNER/NAME of a path."""
  repository = path.removeprefix(PREFIX)
  if not re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', repository, re.ASCII):
    raise UserError(f'{path}: write hf:OWNER/NAME, the name of a repository')
  return repository


def _remedy(error: BaseException) -> str:
  """What to do about an error of the hub, or of the way there."""
  cause: BaseException | None = error
  while cause is not None:
    if _NO_CONNECTION & {kind.__name__ for kind in type(cause).__mro__}:
      return 'the hub cannot be reached: check the connection, and try again'
    cause = cause.__cause__ or cause.__context__
  return 'correct the name, or log in if it needs that (hf auth login)'


def _one_line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
