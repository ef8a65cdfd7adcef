#!/usr/bin/env bash
# Start MLflow's server on the head, for localhost alone, unless it runs. With
# ~/mlflow_auth.ini (MLflow's basic_auth.ini) it asks for a password.
set -euo pipefail
address=http://127.0.0.1:5000

# In the environment, not on the command line: a database URI may hold a password.
export MLFLOW_BACKEND_STORE_URI=${MLFLOW_BACKEND_STORE_URI:-sqlite:///$CBNERF_STORAGE/mlflow.db}
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
options=(--host 127.0.0.1 --port 5000 --workers 2)
options+=(--artifacts-destination "${CBNERF_ARTIFACTS:-$CBNERF_STORAGE/mlartifacts}")
if [ -r ~/mlflow_auth.ini ]; then
    pip install -q -c ~/cbnerf/constraints.txt "mlflow[auth]"
    export MLFLOW_AUTH_CONFIG_PATH=~/mlflow_auth.ini
    export MLFLOW_FLASK_SERVER_SECRET_KEY=${MLFLOW_FLASK_SERVER_SECRET_KEY:-$(python -c "import secrets; print(secrets.token_hex())")}
    options+=(--app-name basic-auth)
fi

answers() { python -c "import sys, urllib.request as u; u.urlopen('$address/health', timeout=2)" 2> /dev/null; }
answers && exit
case $MLFLOW_BACKEND_STORE_URI in
    postgresql+psycopg2:*) pip install -q psycopg2-binary ;;
    postgresql*) pip install -q "psycopg[binary]" ;;
esac
setsid nohup mlflow server "${options[@]}" >> "$CBNERF_STORAGE/mlflow.log" 2>&1 < /dev/null &
for _ in $(seq 90); do
    answers && exit
    kill -0 $! 2> /dev/null || break
    sleep 1
done
echo "MLflow's server does not answer at $address; see $CBNERF_STORAGE/mlflow.log" >&2
exit 1
