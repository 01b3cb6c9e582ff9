"""The engine in a process of its own, so that making and clearing away containers takes nothing from calls.

Theory of operation.  To make a container, to read its receipt in full and to clear it away again is more
Python than a whole call, and one interpreter runs only one thread at a time. So the daemon forks, before it
has a thread, a process that has the engine and does nothing else. They share the mount namespace, and speak
over a socketpair: one message for each request, one for each answer, in which a new slot comes with its
descriptors (``transfer.py``). The daemon has all that a call needs of a slot, its process included, which it
can kill; the engine's process keeps what it takes to clear the slot away.

Neither outlives the other. The engine's process is killed with the daemon, and a daemon whose engine has gone
ends: what is left of both is removed at the next start, as after any other crash.
"""
