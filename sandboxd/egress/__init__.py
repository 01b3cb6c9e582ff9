"""The processes that serve containers' connections: ``python -m sandboxd.egress``, without any privilege.

One serves the containers of one caller. It gets the sockets that were opened in their network namespaces, and
the rules, over a socket of the daemon's; it reads what tools and the network send, and has nothing else.
"""
