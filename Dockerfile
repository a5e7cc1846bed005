# A model's server, on a CPU:   docker build -t cocoa .
# On a CUDA GPU:                docker build -t cocoa-cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#                                   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# Then:                         docker run -p 127.0.0.1:8000:8000 -v "$PWD/runs:/models" cocoa \
#                                   serve /models/contrastive/final --host 0.0.0.0
ARG BASE=python:3.12-slim
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# A base without Python (CUDA's) gets its own; the one of python:3.12-slim comes first in PATH.
# hadolint ignore=DL3008
RUN if ! command -v python3 > /dev/null; then \
        apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/venv \
    && useradd --create-home --uid 10001 cocoa
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# torch first, in the build for this base: by default the one without CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "torch>=2.6" "torchvision>=0.21" --index-url "${TORCH_INDEX}"

WORKDIR /opt/cocoa
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[serve,app,video]"

# What a command writes lies in this folder; what it reads of the Hub in the home of the user.
USER 10001
WORKDIR /home/cocoa
EXPOSE 8000
ENTRYPOINT ["cocoa"]
CMD ["serve", "/opt/cocoa/checkpoints/cocoa-tiny", "--host", "0.0.0.0"]
