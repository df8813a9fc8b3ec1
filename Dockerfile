# The examples of this repository: the notebook server, workers, and the programs that send workflows.
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app

# What is built here is handed on as files: other settings in pyproject.toml leave the dependencies' layer as it is.
FROM base AS build
RUN pip install --quiet "hatchling>=1.26"
COPY pyproject.toml README.md LICENSE ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt
COPY mcp_celery mcp_celery
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

FROM base
RUN useradd --system --uid 10001 --create-home example
COPY --from=build /app/requirements.txt ./
RUN pip install --quiet --requirement requirements.txt
RUN --mount=from=build,source=/app/dist,target=/dist pip install --quiet --no-deps /dist/*.whl
COPY examples examples
USER 10001
CMD ["python", "-m", "examples.notebook.run"]
