# Two targets:  docker build -t trimtab:local .                       CPU, the default
#               docker build -t trimtab:local-cuda --target cuda .    NVIDIA GPU
# Base images are pinned to exact versions here; a release also pins their digests.
# deploy/cpu/*.lock is for this Python; deploy/cuda/requirements.lock for this vLLM and its Python.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS base
# libnuma: vLLM's CPU library links against it. g++: torch compiles the log-probability kernel when first asked for it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /var/lib/trimtab --no-create-home trimtab \
    && install --directory --owner=trimtab --group=trimtab /var/lib/trimtab
ENV TRIMTAB_HOME=/var/lib/trimtab \
    PATH=/opt/trimtab/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1

FROM base AS build
WORKDIR /src
COPY . .
RUN python deploy/cpu/install.py /opt/trimtab --locked
WORKDIR /var/lib/trimtab
USER 10001:10001
ENV HOME=/var/lib/trimtab
# The default model is part of the image, so a container starts without a network.
RUN trimtab models prepare smollm2-135m-instruct

FROM ${VLLM_IMAGE} AS cuda
RUN useradd --uid 10001 --user-group --home-dir /var/lib/trimtab --no-create-home trimtab \
    && install --directory --owner=trimtab --group=trimtab /var/lib/trimtab
# The second pip has no index: it fails unless vLLM's image and the lock have all that Trimtab needs.
RUN --mount=type=bind,target=/src,rw \
    python3 -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: \
        --requirement /src/deploy/cuda/requirements.lock \
    && python3 -m pip install --no-cache-dir --no-index --no-build-isolation "/src[cuda]"
ENV HOME=/var/lib/trimtab \
    TRIMTAB_HOME=/var/lib/trimtab \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /var/lib/trimtab
USER 10001:10001
RUN trimtab models prepare smollm2-135m-instruct
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["trimtab"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS cpu
# HOME is the cache volume: vLLM, torch and Hugging Face keep their caches there as well.
ENV HOME=/var/lib/trimtab
COPY --from=build /opt/trimtab /opt/trimtab
COPY --from=build --chown=10001:10001 /var/lib/trimtab /var/lib/trimtab
WORKDIR /var/lib/trimtab
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["trimtab"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
