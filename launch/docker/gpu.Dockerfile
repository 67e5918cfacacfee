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
# No GPU is seen while an image is built: --build-arg COMPUTE_CAPABILITY=8.0 for A100, which need flash-attn.
ARG COMPUTE_CAPABILITY=9.0
RUN DEVICE=cuda VENV=/opt/venv PROGRAMS='' COMPUTE_CAPABILITY=$COMPUTE_CAPABILITY PIP_NO_CACHE_DIR=1 bash launch/setup.sh
# A cluster takes jobs, and KubeRay sees that it lives, only with ray[default].
RUN pip install --no-cache-dir --constraint requirements/gpu.txt "ray[default]==2.60.0"

ENTRYPOINT ["async-rl"]
