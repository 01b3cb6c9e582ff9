"""The policies that the suite writes for the daemon, as YAML.

Each is ``conformance-NAME``, so that they stand beside an operator's own. ``$…`` is filled in by ``texts``.
"""

from __future__ import annotations

from string import Template

__all__ = ["LENT", "OF_OURS", "PREFIX", "texts"]

PREFIX = "conformance-"
LENT = "lent by the operator\n"
"""The content of the file that the policy ``proof`` lends."""

PLAIN = """
image: $base
limits:
  wall: $wall
  memory: 96MiB
  pids: 32
  workspace: {size: 16MiB, inodes: 1k}
  tmp: {size: 8MiB, inodes: 500}
process: {user_namespace: $user_namespace, env: {OF_POLICY: "1", BOTH: policy}}
"""

CHILDREN = {
    "python": "extends: conformance-plain\nimage: $python\n",
    # Every key of a policy that a receipt has a line for, with a value that is not the default.
    "proof": """
extends: conformance-python
limits:
  cpus: 0.5
  pids: 24
  open_files: 64
  file_size: 12MiB
  workspace: {size: 8MiB, inodes: 200}
  tmp: {size: 4MiB, inodes: 100}
process: {user: 1234, group: 4321, umask: "0027", hostname: proving}
mounts: [{source: $lent, target: /lent}]
""",
    "overlay": """
extends: conformance-python
process: {user: $root}
filesystem: {root: overlay, size: 8MiB, inodes: 300}
""",
    "io": "extends: conformance-python\nlimits: {io: {read: 4MiB, write: 4MiB}}\n",
    "cpu": "extends: conformance-plain\nlimits: {cpu_time: 200ms}\n",
    "small": """
extends: conformance-python
limits: {memory: 32MiB, workspace: {size: 6MiB, inodes: 200}, tmp: {size: 4MiB, inodes: 100}}
""",
    "few": "extends: conformance-python\nlimits: {open_files: 32, file_size: 1MiB, pids: 12}\n",
    "cut": "extends: conformance-plain\nlimits: {stdout: 64KiB, stderr: 16KiB}\n",
    "kill": """
extends: conformance-plain
limits: {stdout: {size: 64KiB, on_limit: kill}, stderr: {size: 16KiB, on_limit: kill}}
""",
    "loud": "extends: conformance-plain\nlimits: {stdout: 64MiB, stderr: 64MiB}\n",
    "files": """
extends: conformance-plain
artifacts: [{path: "out/**", max_size: 1MiB}, {path: "*.txt"}]
""",
    "release": """
extends: conformance-plain
artifacts: [{path: "out/*", type: [image/png, text/plain], count: 2, secrets: deny}]
""",
    "strict": "extends: conformance-python\nsyscalls: {base: strict}\n",
    "root": "extends: conformance-python\nprocess: {user: $root}\n",
    "warm": "extends: conformance-python\nwarm: {command: python3, preload: [json]}\n",
    "fresh": "extends: conformance-warm\nwarm: !remove\n",
    "secrets": """
extends: conformance-python
secrets: [{name: CONFORMANCE_FILE, as: file}, {name: CONFORMANCE_ENV, as: env}]
artifacts: [{path: "**"}]
""",
    "secrets-warm": """
extends: conformance-warm
secrets: [{name: CONFORMANCE_FILE, as: file}, {name: CONFORMANCE_ENV, as: env}]
""",
    "network": """
extends: conformance-python
network:
  allow:
    - {host: served.conformance.test, ports: [$port]}
    - {cidr: 127.0.0.0/8, ports: [$port]}
""",
    "https": """
extends: conformance-python
network: {allow: [{host: served.conformance.test, ports: [$port], methods: [GET]}]}
""",
    "requests": """
extends: conformance-python
network:
  allow:
    - host: served.conformance.test
      ports: [$web]
      within: [127.0.0.0/8]
      methods: [GET]
      paths: [/open/**]
      inject: {header: X-Given, value: on the way}
  budget: {requests: 3}
""",
    "network-budget": "extends: conformance-network\nnetwork: {budget: {connections: 2}}\n",
    "network-session": "extends: conformance-network\nnetwork: {budget: {session: {connections: 3}}}\n",
    "network-outside": """
extends: conformance-python
network: {allow: [{host: "*.conformance.test", ports: [$port]}]}
""",
    "patient": """
extends: conformance-plain
retry: {backoff: 50ms..50ms, memory: {times: 1, raise: {memory: 256MiB}}}
""",
    "again": """
extends: conformance-plain
limits: {stdout: {size: 16KiB, on_limit: kill}}
artifacts: [{path: "out/*"}]
retry:
  backoff: 20ms..20ms
  exited: {times: 2, codes: [75]}
  signalled: {signals: [SIGSEGV]}
  output: {raise: {stdout: 64KiB}}
""",
    "exposed": "extends: conformance-python\nexpose: [8080, 8081]\n",
    "exposed-network": "extends: conformance-network\nexpose: [8080, 8081]\n",
    "if-success": "extends: conformance-python\ncommit: success\n",
    "if-ran": "extends: conformance-python\ncommit: always\n",
    "if-never": "extends: conformance-python\ncommit: never\n",
    "host": "extends: conformance-python\nnetwork: {mode: host}\n",
    "kept": "extends: conformance-python\nisolation: session\n",
}


OF_OURS = {f"{PREFIX}host"}
"""Those that a daemon has to be configured for, as the suite's own is."""


def texts(**values: str) -> dict[str, str]:
    """The text of each policy by its full name; ``values`` are those of the ``$`` above."""
    return {
        f"{PREFIX}{name}": f"version: 1\nname: {PREFIX}{name}\n{Template(body).substitute(values).lstrip()}"
        for name, body in {"plain": PLAIN, **CHILDREN}.items()
    }
