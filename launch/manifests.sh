# shellcheck shell=bash disable=SC2154
# Sourced by tpu.sh, which sets the variables: the same run as a GKE JobSet and as a
# SkyPilot task.

# The arguments as a list that YAML (and JSON) reads.
list() {
  local item separator=''
  printf '['
  for item; do
    item=${item//\\/\\\\}
    printf '%s"%s"' "$separator" "${item//\"/\\\"}"
    separator=', '
  done
  printf ']'
}

# Fields: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and batch/v1 Job.
# The first pod that fails ends the Job (backoffLimit 0). Codes that mean an error fail it
# by the pod failure policy, which fails the JobSet; any other, 42 and 128 and above,
# starts all workers again.
jobset() {
  local chips per_host=4 accelerator crosses sides
  # Pods are named NAME-workers-0-NUMBER-xxxxx, in a label of 63 letters.
  [ ${#name} -le 40 ] || fail "$name: give a JobSet a name of at most 40 letters"
  [ -n "$image" ] || fail 'jobset needs --image=IMAGE, one with this code: launch/Dockerfile'
  [[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
    fail "--topology=$topology: give that of the node pool, such as 4x4 or 2x2x4"
  chips=$((${topology//x/*}))
  crosses=${topology//[0-9]/}
  case $type in v4-* | v5p-*) sides=3 ;; *) sides=2 ;; esac
  [ $((${#crosses} + 1)) = $sides ] ||
    fail "--topology=$topology: slices of $type have $sides sides"
  # v2 to v4 and v5p are named by their cores, two a chip.
  case $type in
    v3-8) accelerator=tpu-v3-device ;;
    v3-*) accelerator=tpu-v3-slice ;;
    v4-*) accelerator=tpu-v4-podslice ;;
    v5p-*) accelerator=tpu-v5p-slice ;;
    v5litepod-*) accelerator=tpu-v5-lite-podslice ;;
    v6e-*) accelerator=tpu-v6e-slice ;;
    *) fail "--type=$type: GKE has v3, v4, v5litepod, v5p and v6e" ;;
  esac
  case $type in
    v5litepod-* | v6e-*)
      [ "${type##*-}" = "$chips" ] ||
        fail "--topology=$topology has $chips chips, --type=$type has ${type##*-}"
      # Up to eight chips are one host.
      if [ "$chips" -le 8 ]; then per_host=$chips; fi
      ;;
    *)
      [ "${type##*-}" = $((2 * chips)) ] ||
        fail "--topology=$topology has $((2 * chips)) cores, --type=$type has ${type##*-}"
      ;;
  esac
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $attempts
    rules:
      - name: error
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $((chips / per_host))
          parallelism: $((chips / per_host))
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: worker
                  operator: In
                  values: [1, 2, 126, 127]
          template:
${data:+            metadata:
              annotations:
                gke-gcsfuse/volumes: 'true'
                gke-gcsfuse/ephemeral-storage-limit: '0'
}            spec:
              restartPolicy: Never
              # Time to write a checkpoint after SIGTERM.
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
${spot:+                cloud.google.com/gke-spot: 'true'
}              containers:
                - name: worker
                  image: $image
                  workingDir: /jaxrobust
                  command: [bash, launch/worker.sh]
                  args: $(list "$@")
                  env:
                    - name: JAXROBUST_TPU
                      value: '1'
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                  resources:
                    limits:
                      google.com/tpu: $per_host
YAML
  if [ -n "$data" ]; then
    local bucket=${data#gs://}
    local folder=${bucket#"${bucket%%/*}"}
    cat << YAML
                  volumeMounts:
                    - name: data
                      mountPath: /jaxrobust/data
                      readOnly: true
              volumes:
                - name: data
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    readOnly: true
                    volumeAttributes:
                      bucketName: ${bucket%%/*}
                      mountOptions: implicit-dirs${folder:+,only-dir=${folder#/}}
                      # Images are read at random: whole shards go to the node's disk.
                      fileCacheCapacity: '-1'
                      fileCacheForRangeRead: 'true'
YAML
  fi
}

# SkyPilot runs setup and run on every host. It uses 137 itself and takes it for no code
# to recover from, so that a killed program ends as an aborted one. 128 + N is signal N.
skypilot() {
  cat << YAML
name: $name
workdir: .
resources:
  infra: gcp${zone:+/${zone%-*}/$zone}
  accelerators: tpu-$type
  accelerator_args:
    runtime_version: $runtime
  use_spot: $([ -n "$spot" ] && echo true || echo false)
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes: [42$(printf ', %s' {128..136} {138..159})]
${data:+file_mounts:
  ~/data:
    source: $data
    mode: COPY
}setup: |
  bash launch/worker.sh --setup
${data:+  ln -sfn ~/data data
}run: |
  code=0
  bash launch/worker.sh$(printf ' %q' "$@") || code=\$?
  exit \$((code == 137 ? 134 : code))
YAML
}
