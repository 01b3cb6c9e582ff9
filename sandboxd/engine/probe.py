"""The shape that a probe runs: every control that needs no image, with small limits."""

from __future__ import annotations

from sandboxd.plan import ImageRef, Limits, Root, Shape, ToolProcess
from sandboxd.policy import seccomp

__all__ = ["probe_shape"]


def probe_shape() -> Shape:
    """A shape of ``image: host``, which every host has."""
    mebi = 2**20
    return Shape(
        policy="probe",
        policy_digest="",
        image=ImageRef("host", "host"),
        limits=Limits(
            wall=5_000_000,
            cpu_time=None,
            cpus=1000,
            memory=64 * mebi,
            pids=16,
            open_files=64,
            file_size=None,
            workspace_size=mebi,
            workspace_inodes=64,
            tmp_size=mebi,
            tmp_inodes=64,
            stdout=1024,
            stderr=1024,
            on_output="truncate",
            io_read=None,
            io_write=None,
        ),
        process=ToolProcess(uid=1000, gid=1000, user_namespace="slot", hostname="probe", umask=0o022),
        root=Root("read-only", mebi, 64),
        mounts=(),
        syscalls=seccomp.resolve("strict", (), ()),
        network=None,
    )
