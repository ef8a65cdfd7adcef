# The image of clusters/kuberay.yaml: the search and all that it needs, for a user without rights.
#
#   docker build -t cbnerf:cuda .
#   docker build -t cbnerf:cpu --build-arg ACCELERATOR=cpu --build-arg CPU_WHEELS=INDEX .
#
# INDEX is the package index of PyTorch's CPU wheels, which its installation page names.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# `cpu` takes a fifth of the room: MLflow's server needs no more.
ARG ACCELERATOR=cuda
ARG CPU_WHEELS

# KubeRay's probes call wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home cbnerf

WORKDIR /home/cbnerf/cbnerf
COPY constraints.txt ./
RUN if [ "$ACCELERATOR" = cpu ]; then \
        pip install --no-cache-dir --no-deps --index-url "${CPU_WHEELS:?}" -c constraints.txt torch; \
    else \
        pip install --no-cache-dir -c constraints.txt torch; \
    fi

COPY pyproject.toml README.md LICENSE tune.py ./
COPY cbnerf cbnerf
COPY tune_configs tune_configs
# Wheels alone: there is no compiler here, and none is needed.
RUN pip install --no-cache-dir --only-binary :all: -c constraints.txt -e ".[search]" boto3 "psycopg[binary]" \
    && python -m compileall -q cbnerf

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
CMD ["python", "tune.py", "--help"]
