# GPU runs, on vLLM's own image, which has CUDA, torch and vLLM: only what it lacks is added.
#
#     docker build -f docker/gpu.Dockerfile -t qerl-sync:gpu .
#     docker run --rm --gpus all --ipc=host -v "$PWD/runs:/work/runs" qerl-sync:gpu train CONFIG.yaml
#
# scripts/check lints it (hadolint). It was not built: where it was written no Docker engine ran.
ARG VLLM=v0.31.0
FROM vllm/vllm-openai:${VLLM}
COPY pyproject.toml README.md LICENSE /src/
COPY qerl_sync /src/qerl_sync
RUN pip install --no-cache-dir '/src[trl,peft,plot]' && rm -rf /src
COPY configs /work/configs
WORKDIR /work
ENTRYPOINT ["qerl-sync"]
CMD ["doctor"]
