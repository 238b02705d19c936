# syntax=docker/dockerfile:1
# Two images from one source: `api` (also runs migrate and beat; no TensorFlow) and `worker`.
#   docker build --target api -t litesmith-api .
#   docker build --target worker -t litesmith-worker .

FROM python:3.11.13-slim-bookworm AS build
ENV UV_PROJECT_ENVIRONMENT=/opt/litesmith UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 \
    UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /src
COPY pyproject.toml uv.lock README.md LICENSE ./

# Dependencies first: they change less often than the source.
FROM build AS build-api
RUN uv sync --frozen --no-dev --no-install-project
COPY app app
COPY workers workers
COPY migrations migrations
RUN uv sync --frozen --no-dev --no-editable

FROM build AS build-worker
RUN uv sync --frozen --no-dev --no-install-project --extra worker
COPY app app
COPY workers workers
COPY migrations migrations
RUN uv sync --frozen --no-dev --no-editable --extra worker

FROM python:3.11.13-slim-bookworm AS base
RUN useradd --system --uid 10001 --create-home litesmith \
    && install -d -o litesmith -g litesmith /var/lib/litesmith /var/lib/litesmith/tmp
# The temporary directory lies in the volume: uploads in progress need room, and workers of one
# machine share the lock that keeps their latency measurements apart.
ENV PATH=/opt/litesmith/bin:$PATH PYTHONUNBUFFERED=1 \
    LITESMITH_DATA_DIR=/var/lib/litesmith TMPDIR=/var/lib/litesmith/tmp
WORKDIR /var/lib/litesmith
USER litesmith
VOLUME /var/lib/litesmith

FROM base AS worker
# Google's compiler for the Edge TPU, under terms of its own: https://coral.ai/docs/edgetpu/compiler/.
# Leave it out by --build-arg EDGETPU_COMPILER=no; on other processors there is none.
ARG EDGETPU_COMPILER=yes
USER root
RUN if [ "$EDGETPU_COMPILER" = yes ] && [ "$(dpkg --print-architecture)" = amd64 ]; then \
        python -c "from urllib.request import urlretrieve as get; get('https://packages.cloud.google.com/apt/doc/apt-key.gpg', '/usr/share/keyrings/coral-edgetpu.asc')" \
        && echo "deb [signed-by=/usr/share/keyrings/coral-edgetpu.asc] https://packages.cloud.google.com/apt coral-edgetpu-stable main" \
            > /etc/apt/sources.list.d/coral-edgetpu.list \
        && apt-get update && apt-get install -y --no-install-recommends edgetpu-compiler \
        && rm -rf /var/lib/apt/lists/*; \
    fi
USER litesmith
COPY --from=build-worker /opt/litesmith /opt/litesmith
# No HEALTHCHECK: a worker that dies is restarted, and whether any is heard of, `/readyz` says.
CMD ["litesmith", "worker"]

FROM base AS api
COPY --from=build-api /opt/litesmith /opt/litesmith
ENV LITESMITH_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["litesmith", "api"]
