# A run on CPUs, as `make train` makes it. Untested: written where no image can be built.
#   docker build -f launch/docker/cpu.Dockerfile -t async-rl:cpu .
FROM python:3.11-slim-bookworm

# g++: vLLM and torch compile kernels at start. make: the Makefile is how everything is called.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# Where pip finds torch==2.13.0+cpu, if the default index has none.
ARG PIP_EXTRA_INDEX_URL=
COPY requirements requirements
RUN PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL pip install --no-cache-dir --no-deps -r requirements/cpu.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

ENTRYPOINT ["async-rl"]
CMD ["train", "configs/tiny_moe.yaml"]
