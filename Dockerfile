# The app for a GPU box or a Space: port 7860, data in /data, user 1000.
FROM python:3.11-slim

# triton, for MOCHI_COMPILE, builds its launcher with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 mochi && install -d -o mochi -g mochi /app /data
WORKDIR /app

COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY --chown=mochi:mochi app.py README.md LICENSE ./
COPY --chown=mochi:mochi mochi_app mochi_app
COPY --chown=mochi:mochi assets assets

USER mochi
ENV GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860 \
    MOCHI_DATA_DIR=/data \
    HF_HOME=/data/hub \
    PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 7860

# /livez, not /healthz: a model that still loads is no reason to restart the container.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/livez', timeout=4)"]

# exec form: the app is process 1 and gets SIGTERM itself.
STOPSIGNAL SIGTERM
CMD ["python", "app.py"]
