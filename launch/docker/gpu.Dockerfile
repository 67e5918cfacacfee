# A run on NVIDIA GPUs. Untested: neither the image nor the GPU paths of the package have run yet.
#   docker build -f launch/docker/gpu.Dockerfile -t async-rl:gpu .
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu22.04

RUN apt-get update && apt-get install -y --no-install-recommends g++ git make numactl software-properties-common \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
RUN python3.11 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY . .
# Not pinned beyond pyproject.toml: requirements/ has the complete pins of the CPU environment only. ray-metrics: a cluster
# takes jobs, and KubeRay sees that it lives, only with ray[default].
RUN pip install --no-cache-dir "setuptools>=77" wheel && pip install --no-cache-dir --editable ".[gpu,ray-metrics]"

ENTRYPOINT ["async-rl"]
