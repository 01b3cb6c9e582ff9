from sessioned import daemon, session

__all__ = ["daemon", "session"]
