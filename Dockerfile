# edgetune for CPUs: export, run and validate without torch.
#   docker build -t edgetune . && docker run --rm -v "$PWD:/work" edgetune doctor
FROM python:3.13-slim-trixie AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential cmake ninja-build git \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt .
RUN python -m venv /opt/edgetune \
 && /opt/edgetune/bin/pip install --no-cache-dir -c constraints.txt llama-cpp-python
COPY . .
RUN /opt/edgetune/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.13-slim-trixie
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home edgetune
COPY --from=build /opt/edgetune /opt/edgetune
ENV PATH=/opt/edgetune/bin:$PATH
USER 1000
WORKDIR /work
ENTRYPOINT ["edgetune"]
CMD ["--help"]
