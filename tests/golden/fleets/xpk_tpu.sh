#!/bin/bash
# A workload of xpk: GKE waits for machines of the cluster, runs the command on
# all hosts in a container, and starts it again after a preemption, at most
# --max-restarts times. Exit code 75 is that of a run that was asked to stop, and
# saved itself; 127 to 255 (a signal) are started again anyway.
#
# --script-dir is copied into the image, which docker builds and pushes, without
# what .dockerignore names. Run this in the checkout.
exec xpk workload create \
  --cluster=my-cluster \
  --workload=mine \
  --tpu-type=v5litepod-16 \
  --num-slices=1 \
  --base-docker-image=python:3.12 \
  --script-dir=. \
  --spot \
  --zone=us-west4-a \
  --project=my-project \
  --max-restarts=20 \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  '--command=pip install --quiet -e '"'"'.[tpu,gcs]'"'"' && exec python -m jaxreason.main --config=configs/gsm8k.py --config.rl.steps=50 --workdir=gs://my-bucket/runs/mine --code_when_stopped=75'
