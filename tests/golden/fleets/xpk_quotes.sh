#!/bin/bash
# A workload of xpk: GKE waits for machines of the cluster, runs the command on
# all hosts in a container, and starts it again after a preemption, at most
# --max-restarts times. Exit code 75 is that of a run that was asked to stop, and
# saved itself; 127 to 255 (a signal) are started again anyway.
#
# --docker-image is used as it is: it holds jaxreason, and is in the folder of the checkout.
# The command has characters that YAML, bash or Kubernetes would change, hence base64.
# --storage: of the cluster, where it must be mounted at /results.
exec xpk workload create \
  --cluster=my-cluster \
  --workload=mine \
  --device-type=h100-80gb-8 \
  --docker-image=gcr.io/p/i:1 \
  --storage=results-storage \
  --max-restarts=20 \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  '--command=echo ZXhlYyBweXRob24gLW0gamF4cmVhc29uLm1haW4gLS1jb25maWc9Y29uZmlncy9nc204ay5weSAtLWNvbmZpZy5ybC5zdGVwcz01MCAnLS1jb25maWcudGV4dC5pbnN0cnVjdGlvbj1pdCciJyIncyAkKDUpJyAtLXdvcmtkaXI9L3Jlc3VsdHMvbWluZSAtLWNvZGVfd2hlbl9zdG9wcGVkPTc1Cg== | base64 -d > /tmp/jaxreason-run && exec bash /tmp/jaxreason-run'
