# The example of this repository: its MCP server, its workers and the program that sends the workflow.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
RUN useradd --system --uid 10001 --create-home example

# The dependencies change seldom, so they are a layer of their own.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --quiet --requirement /tmp/requirements.txt

COPY README.md LICENSE ./
COPY mcp_celery mcp_celery
RUN pip install --quiet --no-deps .

COPY examples examples
USER 10001
CMD ["python", "-m", "examples.notebook.run"]
