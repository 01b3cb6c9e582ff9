"""The ``docker`` engine: containers by a Docker Engine on this host; ``engine.py`` says how it works."""

from sandboxd.engine.docker.endpoint import DockerEndpoint
from sandboxd.engine.docker.engine import DockerEngine
from sandboxd.engine.docker.images import DockerImages

__all__ = ["DockerEndpoint", "DockerEngine", "DockerImages"]
