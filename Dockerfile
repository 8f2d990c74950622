# syntax=docker/dockerfile:1
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# Dependencies change rarely and are the largest part, so torch and the others get image layers of their own.
# pip reads PIP_EXTRA_INDEX_URL, the index of another build of torch, whose hash is then not known. Without it, pip installs
# the CUDA build (gigabytes) with hashes; see README.md, "Which torch".
ARG PIP_EXTRA_INDEX_URL=""
COPY constraints.txt requirements/service.txt requirements/torch.txt ./
RUN if [ -n "$PIP_EXTRA_INDEX_URL" ]; \
    then pip install --no-deps "$(grep '^torch==' constraints.txt)"; \
    else pip install --no-deps --require-hashes -r torch.txt; fi
RUN pip install --no-deps --require-hashes -r service.txt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY service service
RUN pip install --no-deps .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home batchnorm && install -d -o batchnorm -g batchnorm /data
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BATCHNORM_HOST=0.0.0.0 \
    BATCHNORM_STORE=sqlite:////data/batchnorm.db \
    BATCHNORM_TOKENS_FILE=/data/tokens
USER batchnorm
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
CMD ["batchnorm-service", "serve"]
