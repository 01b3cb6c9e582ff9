"""System calls that no policy can allow, each set with its reason. Data only."""

from __future__ import annotations

__all__ = ["NEVER", "PROBED"]

_SETS: tuple[tuple[str, str], ...] = (
    (("mount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick "
     "mount_setattr statmount listmount swapon swapoff"),
     "mounts are the daemon's; the mount calls are the widest way into the kernel's file systems"),
    ("unshare setns listns",
     "a namespace of its own gives a tool capabilities in it, and with them the rest of the kernel"),
    ("clone3",
     "its flags lie in memory, where no filter can see a new namespace; libc falls back to clone"),
    ("bpf", "programs of the tool's would run in the kernel"),
    ("perf_event_open", "it measures and samples beyond the container"),
    ("io_uring_setup io_uring_enter io_uring_register",
     "its operations do not pass system call filters"),
    ("userfaultfd", "it stops the kernel in the middle of a copy, which makes races exploitable"),
    ("add_key request_key keyctl", "keyrings are not wholly namespaced"),
    ("name_to_handle_at open_by_handle_at",
     "file handles reach files outside of the container's mounts"),
    ("memfd_secret", "its memory cannot be read back, dumped or reclaimed"),
    ("init_module finit_module delete_module create_module get_kernel_syms query_module",
     "modules are the host's"),
    ("kexec_load kexec_file_load reboot", "they end the host"),
    ("acct quotactl quotactl_fd", "accounting and quotas are the host's"),
    ("syslog", "the kernel's log is the host's"),
    ("settimeofday clock_settime adjtimex clock_adjtime", "the clock is the host's"),
    ("sethostname setdomainname vhangup", "names and terminals of the container are the daemon's"),
    ("fanotify_init fanotify_mark", "it watches whole mounts and can hold up other processes"),
    ("lsm_get_self_attr lsm_set_self_attr lsm_list_modules",
     "the security module's attributes are the daemon's"),
    ("iopl ioperm", "ports of the machine"),
    ("modify_ldt", "16-bit segments have been a way into the kernel; nothing current needs them"),
    ("uretprobe uprobe", "only the kernel's own trampolines may make this call"),
    (("lookup_dcookie nfsservctl uselib ustat sysfs _sysctl afs_syscall getpmsg putpmsg security tuxcall "
     "vserver epoll_ctl_old epoll_wait_old set_thread_area get_thread_area remap_file_pages"),
     "it is obsolete: removed from the kernel, or called by no current library"),
)  # fmt: skip

NEVER = {name: why for names, why in _SETS for name in names.split()}
"""What ``allow`` refuses, even by a group, and why."""

PROBED = {
    "clone3": "libc tries it before clone for each thread and falls back on ENOSYS, and only on that",
}
"""Answered ENOSYS by the filter itself, unreported: not attempts, but how a library finds its kernel."""
