"""The JobSet and the SkyPilot task that tpu.sh prints, and the schema of the first."""

import json
import os
import random
import re
import subprocess

import pytest
import yaml

from launch import LaunchError, manifests, text, tpu

WORDS = ('train', '--workdir=gs://b/a b', '--x="\\')

# The fields that may stand in a JobSet and what it holds, of the published schemas
# (jobset.x-k8s.io/v1alpha2, batch/v1, core/v1): a type, a set of values, the fields of
# an object, or a list of one of these. Those that must stand are marked with '!'.
_TEXTS = {'*': str}
_METADATA = {'name': str, 'labels': _TEXTS, 'annotations': _TEXTS, 'namespace': str}
_CONTAINER = {
  '!name': str,
  'image': str,
  'command': [str],
  'args': [str],
  'workingDir': str,
  'env': [{'!name': str, 'value': str}],
  'ports': [{'!containerPort': int, 'name': str, 'protocol': {'TCP', 'UDP', 'SCTP'}}],
  'resources': {'limits': {'*': (int, str)}, 'requests': {'*': (int, str)}},
  'volumeMounts': [{'!name': str, '!mountPath': str, 'readOnly': bool}],
}
_CSI = {'!driver': str, 'readOnly': bool, 'volumeAttributes': _TEXTS}
_POD = {
  '!containers': [_CONTAINER],
  'restartPolicy': {'Always', 'OnFailure', 'Never'},
  'terminationGracePeriodSeconds': int,
  'nodeSelector': _TEXTS,
  'volumes': [{'!name': str, 'csi': _CSI}],
}
_EXIT_CODES = {'containerName': str, '!operator': {'In', 'NotIn'}, '!values': [int]}
_POD_RULE = {
  '!action': {'FailJob', 'FailIndex', 'Ignore', 'Count'},
  'onExitCodes': _EXIT_CODES,
}
_JOB = {
  'parallelism': int,
  'completions': int,
  'completionMode': {'NonIndexed', 'Indexed'},
  'backoffLimit': int,
  'podFailurePolicy': {'!rules': [_POD_RULE]},
  '!template': {'metadata': _METADATA, '!spec': _POD},
}
_REASONS = {
  'BackoffLimitExceeded',
  'DeadlineExceeded',
  'FailedIndexes',
  'MaxFailedIndexesExceeded',
  'PodFailurePolicy',
}
_JOBSET_RULE = {
  'name': str,
  '!action': {'FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts'},
  'onJobFailureReasons': [_REASONS],
  'targetReplicatedJobs': [str],
}
_JOBS = {'!name': str, 'replicas': int, '!template': {'spec': _JOB}}
JOBSET = {
  '!apiVersion': {'jobset.x-k8s.io/v1alpha2'},
  '!kind': {'JobSet'},
  '!metadata': _METADATA,
  '!spec': {
    'replicatedJobs': [_JOBS],
    'failurePolicy': {'maxRestarts': int, 'rules': [_JOBSET_RULE]},
  },
}


def assert_fits(value, schema, where=''):
  """A value has the fields of a schema, and no others."""
  if isinstance(schema, list):
    assert isinstance(value, list) and value, where
    for item in value:
      assert_fits(item, schema[0], where)
  elif isinstance(schema, dict):
    assert isinstance(value, dict) and value, where
    needed = {name[1:] for name in schema if name.startswith('!')}
    assert needed <= set(value), where
    known = {name.lstrip('!'): of for name, of in schema.items()}
    for name, item in value.items():
      assert name in known or '*' in known, f'{where}.{name}'
      assert_fits(item, known.get(name, known.get('*')), f'{where}.{name}')
  elif isinstance(schema, set):
    assert value in schema, where
  else:  # A bool is an int, but not where one is wanted.
    assert isinstance(value, schema) and (schema is bool) == (type(value) is bool), (
      where
    )


@pytest.fixture
def manifest(capfd, monkeypatch):
  """Reads what tpu.sh prints; it needs no gcloud, and would not find one."""

  def read(verb, *flags, words=WORDS):
    with monkeypatch.context() as patch:
      patch.setenv('PATH', '/usr/bin:/bin')
      patch.setattr('launch.code.check_words', lambda _: None)
      code = tpu.main([verb, 'x', *flags, *words])
    out, err = capfd.readouterr()
    assert (code, err) == (0, '')
    return yaml.safe_load(out)

  return read


@pytest.fixture
def jobset(manifest):
  def read(*flags, words=WORDS):
    found = manifest('jobset', '--image=i', *flags, words=words)
    assert_fits(found, JOBSET)
    return found

  return read


@pytest.mark.parametrize(
  'accelerator, topology, hosts, chips, name',
  [
    ('v3-32', '4x4', 4, 4, 'tpu-v3-slice'),
    ('v4-8', '2x2x1', 1, 4, 'tpu-v4-podslice'),
    ('v4-32', '2x2x4', 4, 4, 'tpu-v4-podslice'),
    ('v5p-8', '2x2x1', 1, 4, 'tpu-v5p-slice'),
    ('v5litepod-16', '4x4', 4, 4, 'tpu-v5-lite-podslice'),
    ('v6e-8', '2x4', 1, 8, 'tpu-v6e-slice'),
    ('v6e-1', '1x1', 1, 1, 'tpu-v6e-slice'),
  ],
)
def test_jobset(jobset, accelerator, topology, hosts, chips, name):
  found = jobset(f'--type={accelerator}', f'--topology={topology}')
  assert found['metadata']['annotations'] == {
    'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
  }
  (jobs,) = found['spec']['replicatedJobs']
  job = jobs['template']['spec']
  assert job['completionMode'] == 'Indexed'  # Each has a number, as the TPU's hosts.
  assert (job['completions'], job['parallelism']) == (hosts, hosts)
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never'  # a pod failure policy requires it
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': name,
    'cloud.google.com/gke-tpu-topology': topology,
  }
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': chips}
  assert container['command'] == ['bash', 'launch/worker.sh']
  assert container['args'] == list(WORDS)
  assert container['env'] == [{'name': 'JAXROBUST_TPU', 'value': '1'}]
  assert pod['terminationGracePeriodSeconds'] >= 120


def test_jobset_restarts_by_the_exit_code(jobset):
  spec = jobset('--type=v4-8', '--topology=2x2x1', '--attempts=7')['spec']
  assert spec['failurePolicy']['maxRestarts'] == 7
  # A Job fails at its first failed pod, with reason PodFailurePolicy for these codes.
  # JobSet fails for that reason, and for want of another rule restarts for others.
  job = spec['replicatedJobs'][0]['template']['spec']
  assert job['backoffLimit'] == 0
  (rule,) = job['podFailurePolicy']['rules']
  assert (rule['action'], rule['onExitCodes']['operator']) == ('FailJob', 'In')
  container = job['template']['spec']['containers'][0]
  assert rule['onExitCodes']['containerName'] == container['name']
  codes = rule['onExitCodes']['values']
  assert 1 in codes
  assert not {42, *range(128, 256)} & set(codes)
  assert spec['failurePolicy']['rules'] == [
    {
      'name': 'error',
      'action': 'FailJobSet',
      'onJobFailureReasons': ['PodFailurePolicy'],
    }
  ]


def test_jobset_on_spot_nodes_with_data(jobset):
  found = jobset('--type=v4-8', '--topology=2x2x1', '--spot', '--data=gs://b/c/d')
  template = found['spec']['replicatedJobs'][0]['template']['spec']['template']
  assert template['metadata']['annotations'] == {
    'gke-gcsfuse/volumes': 'true',
    'gke-gcsfuse/ephemeral-storage-limit': '0',
  }
  assert template['spec']['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
  (mount,) = template['spec']['containers'][0]['volumeMounts']
  (volume,) = template['spec']['volumes']
  assert mount['name'] == volume['name']
  assert mount['mountPath'] == '/jaxrobust/data'
  assert volume['csi']['volumeAttributes'] == {
    'bucketName': 'b',
    'mountOptions': 'implicit-dirs,only-dir=c/d',
    'fileCacheCapacity': '-1',
    'fileCacheForRangeRead': 'true',
  }


def test_skypilot(manifest, tmp_path):
  task = manifest(
    *('skypilot', '--type=v5litepod-16', '--spot', '--zone=us-west4-a'),
    '--data=gs://b/d',
  )
  assert task['name'] == 'x'
  assert task['resources']['infra'] == 'gcp/us-west4/us-west4-a'
  assert task['resources']['accelerators'] == 'tpu-v5litepod-16'
  assert task['resources']['accelerator_args'] == {
    'runtime_version': 'v2-alpha-tpuv5-lite'
  }
  assert task['resources']['use_spot'] is True
  recovery = task['resources']['job_recovery']
  assert recovery['max_restarts_on_errors'] == 0
  codes = set(recovery['recover_on_exit_codes'])
  # Every signal's but 137, which SkyPilot uses itself; 1 is an error.
  assert codes == {42, *range(128, 160)} - {137}
  assert task['file_mounts'] == {'~/data': {'source': 'gs://b/d', 'mode': 'COPY'}}
  assert 'worker.sh --setup' in task['setup']
  worker = tmp_path / 'launch' / 'worker.sh'
  worker.parent.mkdir()
  worker.write_text('printf "%s\\0" "$@"; exit "$CODE"\n')
  for code, seen in ((0, 0), (1, 1), (42, 42), (137, 134), (143, 143)):
    done = subprocess.run(
      ['bash', '-c', task['run']],
      cwd=tmp_path,
      env={**os.environ, 'CODE': str(code)},
      capture_output=True,
      text=True,
    )
    assert done.returncode == seen
    assert done.stdout.split('\0')[:-1] == list(WORDS)


def test_on_demand_without_data(manifest):
  task = manifest('skypilot', '--type=v4-8', words=['train'])
  assert task['resources']['use_spot'] is False
  assert task['resources']['infra'] == 'gcp'
  assert 'file_mounts' not in task


# What is more than text to YAML, to a shell, to Kubernetes or to a terminal.
PIECES = (
  *('"', "'", '\\', '\n', '\r', '\t', ' ', ': ', ' #', '- ', '? ', '|', '>', '&', '*'),
  *('{', '}', '[', ']', ',', '%', '@', '`', '!', '~', '$', '$$', '$(X)', '$$(X)'),
  *('\x01', '\x07', '\x1b', '\x7f', '\x80', '\x85', '\xa0', '\u2028', '\ufeff'),
  *('\ufffe', '\uffff', 'ü', '\U0001f600', '\U0010ffff', 'yes', 'null', '0x1', '---'),
  *('\n---\n', '\n  privileged: true', '<<: *a', '!!python/object', 'a', '1', '(', ')'),
)


def hostile_words(count, seed=0):
  chosen = random.Random(seed)
  return [''.join(chosen.choices(PIECES, k=chosen.randrange(12))) for _ in range(count)]


def test_any_text_is_a_scalar():
  for word in hostile_words(400):
    quoted = manifests.quoted(word)
    assert yaml.safe_load(f'a: {quoted}\nb: [{quoted}]') == {'a': word, 'b': [word]}
    if all(ord(c) < 0x10000 for c in word):  # JSON has no \\U.
      assert json.loads(quoted) == word


def test_bytes_that_are_not_utf8_are_refused():
  with pytest.raises(LaunchError, match='not UTF-8'):
    manifests.quoted(os.fsdecode(b'a\xff'))


def test_a_line_that_is_shown_says_the_same_to_bash():
  words = [*hostile_words(400, seed=1), os.fsdecode(b'a\xffb'), '\x1bf', '']
  lines = [text.shown(word) for word in words]
  assert all(line.isprintable() for line in lines)
  script = 'printf "%s\\0" ' + ' '.join(lines)
  done = subprocess.run(['bash', '-c', script], capture_output=True, check=True)
  assert [os.fsdecode(x) for x in done.stdout.split(b'\0')[:-1]] == words


def expanded(word, variables):
  """What Kubernetes makes of an argument, by its documentation."""
  return re.sub(
    r'\$\$|\$\(([^)]*)\)',
    lambda m: '$' if m[0] == '$$' else variables.get(m[1], m[0]),
    word,
  )


def test_words_of_a_program_change_no_structure(jobset, manifest, tmp_path):
  words = ['train', *hostile_words(300, seed=2), '--x=$(JAXROBUST_TPU)']
  flags = ('--type=v4-8', '--topology=2x2x1', '--data=gs://b/d', '--spot')
  plain, found = (jobset(*flags, words=w) for w in (['train'], words))
  containers = [
    m['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers']
    for m in (plain, found)
  ]
  args = containers[1][0].pop('args')
  variables = {x['name']: x['value'] for x in containers[1][0]['env']}
  assert [expanded(word, variables) for word in args] == words
  assert containers[0][0].pop('args') == ['train']
  assert plain == found
  plain, found = (
    manifest('skypilot', '--type=v4-8', '--data=gs://b/d', words=w)
    for w in (['train'], words)
  )
  worker = tmp_path / 'launch' / 'worker.sh'
  worker.parent.mkdir()
  worker.write_text('printf "%s\\0" "$@"\n')
  done = subprocess.run(
    ['bash', '-c', found.pop('run')], cwd=tmp_path, capture_output=True, check=True
  )
  assert [os.fsdecode(x) for x in done.stdout.split(b'\0')[:-1]] == words
  plain.pop('run')
  assert plain == found
