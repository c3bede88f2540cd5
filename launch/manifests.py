"""The same run as a GKE JobSet and as a SkyPilot task, in YAML."""

from __future__ import annotations

import re
import shlex

from launch import LaunchError
from launch.gcloud import RUNTIMES

# GKE's name of each family, and the sides of its slices.
_ACCELERATORS = {
  'v3': ('tpu-v3-slice', 2),
  'v4': ('tpu-v4-podslice', 3),
  'v5p': ('tpu-v5p-slice', 3),
  'v5litepod': ('tpu-v5-lite-podslice', 2),
  'v6e': ('tpu-v6e-slice', 2),
}


def quoted(text: str) -> str:
  """A text as a YAML scalar, whatever it holds.

  Raises:
    LaunchError: if it holds bytes that are not UTF-8, which YAML cannot.
  """
  return '"' + ''.join(map(_escaped, text)) + '"'


def _escaped(c):
  code = ord(c)
  if c in '"\\':
    return f'\\{c}'
  if 0xD800 <= code < 0xE000:
    raise LaunchError('an argument is not UTF-8, so that no manifest can hold it')
  if ' ' <= c <= '~':
    return c
  if c == '\n':
    return '\\n'
  return f'\\u{code:04x}' if code < 0x10000 else f'\\U{code:08x}'


def _scalar(value):
  if isinstance(value, str):
    return quoted(value)
  return str(value).lower() if isinstance(value, bool) else str(value)


def _lines(value, indent=''):
  """The lines of a dict, list or scalar; all keys are names of ours."""
  if isinstance(value, dict):
    for key, item in value.items():
      if isinstance(item, dict) or (isinstance(item, list) and _nested(item)):
        yield f'{indent}{key}:'
        yield from _lines(item, indent + '  ')
      else:
        yield f'{indent}{key}: {_flow(item)}'
  else:
    for item in value:
      first, *others = _lines(item, indent + '  ')
      yield f'{indent}- {first.lstrip()}'
      yield from others


def _nested(items):
  return any(isinstance(item, dict) for item in items)


def _flow(value):
  if isinstance(value, list):
    return '[' + ', '.join(map(_scalar, value)) + ']'
  return _scalar(value)


def _dump(document):
  return '\n'.join(_lines(document)) + '\n'


def jobset(command) -> str:
  """A JobSet that runs a tpu.Command.

  Fields: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and batch/v1 Job.
  The first pod that fails ends the Job (backoffLimit 0). Codes that mean an error fail
  it by the pod failure policy, which fails the JobSet; any other, 42 and 128 and above,
  starts all workers again.
  """
  # Pods are named NAME-workers-0-NUMBER-xxxxx, in a label of 63 letters.
  if len(command.name) > 40:
    raise LaunchError(f'{command.name}: give a JobSet a name of at most 40 letters')
  if not command.image:
    raise LaunchError(
      'jobset needs --image=IMAGE, one with this code: launch/Dockerfile'
    )
  accelerator, hosts, chips = _slice(command.type, command.topology)
  rule = {'containerName': 'worker', 'operator': 'In', 'values': [1, 2, 126, 127]}
  job = {
    'completionMode': 'Indexed',
    'completions': hosts,
    'parallelism': hosts,
    'backoffLimit': 0,
    'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': rule}]},
    'template': _pod(command, accelerator, chips),
  }
  failure = {
    'name': 'error',
    'action': 'FailJobSet',
    'onJobFailureReasons': ['PodFailurePolicy'],
  }
  return _dump(
    {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2',
      'kind': 'JobSet',
      'metadata': {
        'name': command.name,
        'annotations': {
          'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
        },
      },
      'spec': {
        'failurePolicy': {'maxRestarts': int(command.attempts), 'rules': [failure]},
        'replicatedJobs': [
          {'name': 'workers', 'replicas': 1, 'template': {'spec': job}}
        ],
      },
    }
  )


def _slice(accelerator, topology):
  """GKE's name of an accelerator, the hosts of a slice, and the chips of a host."""
  if not topology:
    raise LaunchError('--topology=: give that of the node pool, such as 4x4 or 2x2x4')
  family, size = accelerator.split('-')
  if family not in _ACCELERATORS:
    raise LaunchError(f'--type={accelerator}: GKE has v3, v4, v5litepod, v5p and v6e')
  name, sides = _ACCELERATORS[family]
  if accelerator == 'v3-8':
    name = 'tpu-v3-device'
  lengths = [int(length) for length in topology.split('x')]
  if len(lengths) != sides:
    raise LaunchError(
      f'--topology={topology}: slices of {accelerator} have {sides} sides'
    )
  chips = 1
  for length in lengths:
    chips *= length
  single = family in ('v5litepod', 'v6e')
  # The others are named by their cores, two a chip.
  units, unit = (chips, 'chips') if single else (2 * chips, 'cores')
  if int(size) != units:
    raise LaunchError(
      f'--topology={topology} has {units} {unit}, --type={accelerator} has {size}'
    )
  # Up to eight chips are one host of these.
  per_host = chips if single and chips <= 8 else 4
  return name, chips // per_host, per_host


def _pod(command, accelerator, chips):
  """The template of the pods, one for each host."""
  container = {
    'name': 'worker',
    'image': command.image,
    'workingDir': '/jaxrobust',
    'command': ['bash', 'launch/worker.sh'],
    # Kubernetes would put variables in the place of $(NAME), and reads $$ as $.
    'args': [word.replace('$', '$$') for word in command.words],
    'env': [{'name': 'JAXROBUST_TPU', 'value': '1'}],
    'ports': [{'containerPort': 8471}, {'containerPort': 8482}],
    'resources': {'limits': {'google.com/tpu': chips}},
  }
  selector = {
    'cloud.google.com/gke-tpu-accelerator': accelerator,
    'cloud.google.com/gke-tpu-topology': command.topology,
  }
  if command.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  spec = {
    'restartPolicy': 'Never',
    'terminationGracePeriodSeconds': 120,  # To write a checkpoint after TERM.
    'nodeSelector': selector,
    'containers': [container],
  }
  if not command.data:
    return {'spec': spec}
  container['volumeMounts'] = [
    {'name': 'data', 'mountPath': '/jaxrobust/data', 'readOnly': True}
  ]
  spec['volumes'] = [{'name': 'data', 'csi': _volume(command.data)}]
  annotations = {
    'gke-gcsfuse/volumes': 'true',
    'gke-gcsfuse/ephemeral-storage-limit': '0',
  }
  return {'metadata': {'annotations': annotations}, 'spec': spec}


def _volume(data):
  """A bucket's folder as a file system that is only read."""
  bucket, _, folder = data[len('gs://') :].partition('/')
  return {
    'driver': 'gcsfuse.csi.storage.gke.io',
    'readOnly': True,
    'volumeAttributes': {
      'bucketName': bucket,
      'mountOptions': 'implicit-dirs' + (f',only-dir={folder}' if folder else ''),
      # Images are read at random: whole shards go to the node's disk.
      'fileCacheCapacity': '-1',
      'fileCacheForRangeRead': 'true',
    },
  }


def skypilot(command) -> str:
  """A SkyPilot task that runs a tpu.Command: its setup and run are for every host.

  SkyPilot uses 137 itself and takes it for no code to recover from, so that a killed
  program ends as an aborted one. 128 + N is signal N.
  """
  zone, family = command.zone, command.type.split('-')[0]
  task = {
    'name': command.name,
    'workdir': '.',
    'resources': {
      'infra': f'gcp/{re.sub("-[^-]*$", "", zone)}/{zone}' if zone else 'gcp',
      'accelerators': f'tpu-{command.type}',
      'accelerator_args': {'runtime_version': RUNTIMES[family]},
      'use_spot': command.spot,
      'job_recovery': {
        'max_restarts_on_errors': 0,
        'recover_on_exit_codes': [42, *range(128, 137), *range(138, 160)],
      },
    },
  }
  setup = ['bash launch/worker.sh --setup']
  if command.data:
    task['file_mounts'] = {'~/data': {'source': command.data, 'mode': 'COPY'}}
    setup.append('ln -sfn ~/data data')
  words = ' '.join(map(shlex.quote, command.words))
  run = [
    'code=0',
    f'bash launch/worker.sh {words} || code=$?',
    'exit $((code == 137 ? 134 : code))',
  ]
  task['setup'] = '\n'.join(setup) + '\n'
  task['run'] = '\n'.join(run) + '\n'
  return _dump(task)
