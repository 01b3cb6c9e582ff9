"""The daemon's own configuration: one strict YAML file, or none at all."""

from __future__ import annotations

from sandboxd.config.callers import (
    CallbackProgram,
    CallerRule,
    Match,
    SessionShare,
)
from sandboxd.config.file import (
    DEFAULT_PATH,
    SYSTEM_SOCKET,
    Config,
    default_socket,
    load_config,
)
from sandboxd.config.sections import (
    MAX_SOCKET_PATH,
    Budget,
    DockerConfig,
    HttpLimits,
    IdRange,
    JournalConfig,
    NetworkConfig,
    PoolSize,
    Pressure,
    Retention,
    SecretsConfig,
    SocketConfig,
)

__all__ = [
    "DEFAULT_PATH",
    "MAX_SOCKET_PATH",
    "SYSTEM_SOCKET",
    "Budget",
    "CallbackProgram",
    "CallerRule",
    "Config",
    "DockerConfig",
    "HttpLimits",
    "IdRange",
    "JournalConfig",
    "Match",
    "NetworkConfig",
    "PoolSize",
    "Pressure",
    "Retention",
    "SecretsConfig",
    "SessionShare",
    "SocketConfig",
    "default_socket",
    "load_config",
]
