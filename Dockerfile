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
# Healthy: the broker answers, and says that somebody consumes this service's queue.
HEALTHCHECK --interval=10s --timeout=10s --start-period=20s --retries=3 CMD ["python", "-c", "\
import os, sys, pika; \
broker = pika.BlockingConnection(pika.URLParameters(os.environ['IDEMP_TRANSPORT'])); \
queue = broker.channel().queue_declare(os.environ['SERVICE_NAME'] + '-queue', passive=True).method; \
broker.close(); \
sys.exit(queue.consumer_count == 0)"]
CMD ["python", "-m", "svc"]
