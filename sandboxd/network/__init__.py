"""The network of a container: its own loopback, and who serves the connections that end there."""
