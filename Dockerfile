# The sample service.  Its settings are the environment's: README, "Run the service".
# No builder's special words: whatever builds Dockerfiles builds this one.

FROM python:3.11.14-slim-bookworm AS base
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1


FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# All that is locked, each file held to its hash; what follows takes what it needs from here, and asks nobody.
COPY requirements.lock ./
RUN pip download --quiet --require-hashes --no-deps --only-binary :all: --dest /wheels -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY idemp idemp
RUN pip wheel --quiet --no-index --find-links /wheels --no-deps --wheel-dir /wheels . \
    && python -m venv --without-pip /app \
    && pip --python /app/bin/python install --no-index --find-links /wheels \
        'idemp[rabbitmq,etcd,statsd,prometheus]'


FROM base
COPY --from=build /app /app
COPY svc /app/svc
WORKDIR /app
# A number: who runs the image can see that it is not root, without looking into it.
USER 10001:10001
# Healthy: it says itself that its store is open and caught up, and that the broker delivers.
ENV IDEMP_HEALTH_PORT=8080
HEALTHCHECK --interval=10s --timeout=10s --start-period=20s --retries=3 CMD ["python", "-c", "\
import os, urllib.request; \
urllib.request.build_opener(urllib.request.ProxyHandler({})).open( \
'http://127.0.0.1:' + os.environ['IDEMP_HEALTH_PORT'] + '/ready', timeout=5)"]
CMD ["python", "-m", "svc"]
