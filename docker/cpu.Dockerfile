# CPU runs. Build in the checkout; torch's index of CPU wheels as docs/install.md says:
#
#     docker build -f docker/cpu.Dockerfile --build-arg PIP_EXTRA_INDEX_URL=ADDRESS -t qerl-sync:cpu .
#     docker run --rm --shm-size=1g -v "$PWD/runs:/work/runs" qerl-sync:cpu train configs/grpo_cpu.yaml
#
# scripts/check lints it (hadolint). It was not built: where it was written no Docker engine ran.
FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
COPY requirements/cpu.txt /src/requirements/
RUN pip install --no-deps -r /src/requirements/cpu.txt
COPY pyproject.toml README.md LICENSE /src/
COPY qerl_sync /src/qerl_sync
RUN pip install --no-deps --no-build-isolation /src \
    && find /opt/venv -name __pycache__ -type d -prune -exec rm -rf {} +

FROM python:3.11-slim
# vLLM's CPU build: OpenMP and NUMA; a compiler for torch.compile is left out.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
COPY configs /work/configs
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["qerl-sync"]
CMD ["doctor"]
