# popo_lightning in a container, for CPUs or for NVIDIA GPUs: docs/install.md has the commands.
#   docker build -t popo_lightning .
#   docker build -t popo_lightning:gpu --build-arg DEVICE=gpu .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# cpu or gpu. The GPU build needs no GPU, and checks no driver: that of the machine it runs on must be 580 or newer.
ARG DEVICE=cpu
ENV POPO_DEVICE=${DEVICE} \
    POPO_VENV=/opt/popo \
    PATH=/opt/popo/bin:${PATH} \
    PIP_NO_CACHE_DIR=1 \
    UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Triton compiles at run time on a GPU; vLLM's CPU build loads libnuma.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /popo_lightning
COPY . .
RUN bash scripts/setup.sh

# Not root: graders run what a model has written about.
RUN useradd --create-home popo && mkdir -p runs && chown popo runs
USER popo
ENTRYPOINT ["popo"]
CMD ["--help"]
