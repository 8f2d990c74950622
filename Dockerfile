# syntax=docker/dockerfile:1
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && python -m venv --without-pip /opt/venv
WORKDIR /src
# `cpu`, or `cuda` for several gigabytes with NVIDIA's libraries. The CPU build is not on PyPI: pip reads
# PIP_EXTRA_INDEX_URL, the index that has it. Its hash is not in the locks, those of the CUDA build are.
ARG TORCH=cpu
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Dependencies change rarely and are the largest part, so torch and the others get image layers of their own. What only
# debuggers, tests of these packages and compilers of extensions need is removed: docs/deploy.md, "The image".
COPY constraints.txt requirements/service.txt requirements/torch.txt ./
RUN if [ "$TORCH" = cuda ]; \
    then PIP_EXTRA_INDEX_URL= pip --python /opt/venv/bin/python install --no-deps --require-hashes -r torch.txt; \
    else pip --python /opt/venv/bin/python install --no-deps "$(grep '^torch==' constraints.txt)+$TORCH"; fi \
    && cd /opt/venv/lib/python3.11/site-packages/torch \
    && rm -rf include test && find bin -type f ! -name torch_shm_manager -delete \
    && strip --strip-unneeded lib/libtorch_cpu.so lib/libtorch_python.so
RUN pip --python /opt/venv/bin/python install --no-deps --require-hashes -r service.txt \
    && cd /opt/venv/lib/python3.11/site-packages \
    && find mpmath networkx numpy sympy -type d -name tests -prune -exec rm -r {} +
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY service service
RUN pip --python /opt/venv/bin/python install --no-deps .

FROM python:3.11-slim
# As process 1, Python would ignore SIGTERM until the service has started. `tini` is process 1 instead.
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 batchnorm && useradd --uid 10001 --gid 10001 --no-create-home batchnorm \
    && install -d -o batchnorm -g batchnorm /data
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BATCHNORM_HOST=0.0.0.0 \
    BATCHNORM_STORE=sqlite:////data/batchnorm.db \
    BATCHNORM_TOKENS_FILE=/data/tokens
# A number, since Kubernetes has to see that it is not root.
USER 10001
VOLUME /data
EXPOSE 8000
ENTRYPOINT ["tini", "--"]
CMD ["batchnorm-service", "serve"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="batchnorm-service" \
      org.opencontainers.image.description="Named batch-normalization layers over REST: one place where running statistics live" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
