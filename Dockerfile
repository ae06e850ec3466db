# finetune with every library at the version it was tested with. CUDA comes inside the pip wheels, so the host needs the
# NVIDIA driver and its container toolkit only; without --gpus it computes on the CPU.
#
#   docker build -t finetune .
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD":/work -v finetune-hub:/home/tuner/.cache -e HF_TOKEN \
#     --user "$(id -u):$(id -g)" finetune run mine.yaml
#
# The token is read from the environment when it runs; none is written into a layer.
#
# Built on 2026-11-23 with buildah 1.28 (chroot isolation), every line of it: 2.35 GB, as torch's CPU wheel was at hand.
# As the user `tuner` it then ran `finetune doctor`, `validate` and all of `finetune run tiny-pydoc`. No registry could be
# reached: in the place of python:3.11-slim stood Debian 12 with its own Python 3.11 (debootstrap). Not run: that base
# image, docker itself, a GPU. Nothing is compiled when it runs, so no compiler is in it.
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# A home that anyone may write in, for --user; a volume mounted there keeps the Hub's cache from one run to the next.
RUN useradd --create-home --uid 1000 tuner \
 && mkdir -p /work /home/tuner/.cache \
 && chown tuner:tuner /work /home/tuner/.cache \
 && chmod 1777 /work /home/tuner /home/tuner/.cache

WORKDIR /opt/finetune
COPY constraints.txt pyproject.toml README.md LICENSE ./
# The libraries first: a change of our own code leaves their layer, of several gigabytes, as it is.
RUN mkdir finetune recipes \
 && printf '"""Stands in for the package while its libraries are installed."""\n\n__version__ = "0"\n' > finetune/__init__.py \
 && pip install --constraint constraints.txt ".[zstd,gguf,harness]" \
 && pip uninstall --yes finetune-recipes \
 && rm -r finetune recipes
COPY finetune finetune
COPY recipes recipes
RUN pip install --no-deps --constraint constraints.txt .

USER 1000
ENV HOME=/home/tuner HF_HOME=/home/tuner/.cache/huggingface
VOLUME /home/tuner/.cache
WORKDIR /work
ENTRYPOINT ["finetune"]
CMD ["--help"]
