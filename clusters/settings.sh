# What the machines of a cluster agree on. Read by their shells and by cluster.yaml's commands; edit
# here, then `ray up` again. No passwords: those stand in ~/cbnerf.secrets on the head alone.
. ~/venv/bin/activate

# The folder that all machines share: studies, checkpoints, the cache of stages, artifacts.
export CBNERF_STORAGE=/mnt/cbnerf
# An NFS share to keep there, such as fs-0123.efs.us-west-2.amazonaws.com:/. Without one the head
# shares its own disk, and all is gone with it. `mounted`: the folder is already the same everywhere.
export CBNERF_NFS=
# LLFF scenes are looked for in its folder `data`; the built-in ones are used where that holds none.

# The runs: on MLflow's server, which listens to the head alone. Its database, SQLite in the shared
# folder unless ~/cbnerf.secrets names a Postgres: export MLFLOW_BACKEND_STORE_URI=postgresql://...
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
# Where its artifacts go, such as s3://bucket/artifacts; the shared folder if empty.
export CBNERF_ARTIFACTS=
if [ -r ~/cbnerf.secrets ]; then . ~/cbnerf.secrets; fi

# A training run that asks for no GPU sees none.
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1
export RAY_AUTH_MODE=disabled   # The cluster's network is its own; see docs/cluster.md, "Security".
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
