/* Every system call that no policy can allow, with arguments that would do something. */
#include "attack.h"
#include <linux/sched.h>
#include <sys/socket.h>

int main(void)
{
    static char memory[4096], other[4096];
    int null = open("/dev/null", O_RDWR);
    int net = open("/proc/self/ns/net", O_RDONLY);

    CALL("mount", SYS_mount, "tmpfs", "/tmp", "tmpfs", 0, 0);
    CALL("umount2", SYS_umount2, "/proc/sys", 2);
    CALL("pivot_root", SYS_pivot_root, ".", ".");
    CALL("chroot", SYS_chroot, ".");
    CALL("open_tree", SYS_open_tree, AT_FDCWD, "/", 1);
    CALL("move_mount", SYS_move_mount, null, "", AT_FDCWD, "/tmp", 4);
    CALL("fsopen", SYS_fsopen, "tmpfs", 0);
    CALL("fsconfig", SYS_fsconfig, null, 6, 0, 0, 0);
    CALL("fsmount", SYS_fsmount, null, 0, 0);
    CALL("fspick", SYS_fspick, AT_FDCWD, "/", 0);
    CALL("mount_setattr", SYS_mount_setattr, AT_FDCWD, "/", 0, memory, 32);
    CALL("unshare", SYS_unshare, 0x10000000); /* CLONE_NEWUSER */
    CALL("setns", SYS_setns, net, 0x40000000);
    CALL("clone", SYS_clone, 0x10000000 | SIGCHLD, 0, 0, 0, 0);
    struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
    CALL("clone3", SYS_clone3, &args, sizeof args);
    CALL("ptrace", SYS_ptrace, 16, 1, 0, 0); /* PTRACE_ATTACH */
    CALL("process_vm_readv", SYS_process_vm_readv, 1, 0, 0, 0, 0, 0);
    CALL("process_vm_writev", SYS_process_vm_writev, 1, 0, 0, 0, 0, 0);
    CALL("kcmp", SYS_kcmp, getpid(), 1, 0, 0, 0);
    CALL("pidfd_getfd", SYS_pidfd_getfd, null, 3, 0);
    CALL("keyctl", SYS_keyctl, 0, -3, 0, 0, 0);
    CALL("add_key", SYS_add_key, "user", "a", "b", 1, -4);
    CALL("request_key", SYS_request_key, "user", "a", 0, -4);
    CALL("bpf", SYS_bpf, 5, memory, 128);
    CALL("perf_event_open", SYS_perf_event_open, memory, 0, -1, -1, 0);
    CALL("io_uring_setup", SYS_io_uring_setup, 1, memory);
    CALL("io_uring_enter", SYS_io_uring_enter, null, 1, 1, 0, 0, 0);
    CALL("io_uring_register", SYS_io_uring_register, null, 0, 0, 0);
    CALL("userfaultfd", SYS_userfaultfd, 1);
    CALL("name_to_handle_at", SYS_name_to_handle_at, AT_FDCWD, "/", memory, other, 0);
    CALL("open_by_handle_at", SYS_open_by_handle_at, AT_FDCWD, memory, 0);
    CALL("memfd_secret", SYS_memfd_secret, 0);
    CALL("init_module", SYS_init_module, memory, 16, "");
    CALL("finit_module", SYS_finit_module, null, "", 0);
    CALL("delete_module", SYS_delete_module, "x", 0);
    CALL("kexec_load", SYS_kexec_load, 0, 0, 0, 0);
    CALL("kexec_file_load", SYS_kexec_file_load, null, null, 0, "", 0);
    CALL("reboot", SYS_reboot, 0xfee1dead, 672274793, 0x4321fedc, 0);
    CALL("swapon", SYS_swapon, "/tmp/x", 0);
    CALL("acct", SYS_acct, "/tmp/x");
    CALL("quotactl", SYS_quotactl, 0, "/", 0, 0);
    CALL("syslog", SYS_syslog, 3, memory, sizeof memory);
    CALL("settimeofday", SYS_settimeofday, memory, 0);
    CALL("clock_settime", SYS_clock_settime, 0, memory);
    CALL("adjtimex", SYS_adjtimex, memory);
    CALL("sethostname", SYS_sethostname, "x", 1);
    CALL("setdomainname", SYS_setdomainname, "x", 1);
    CALL("vhangup", SYS_vhangup);
    CALL("fanotify_init", SYS_fanotify_init, 0, 0);
    CALL("personality", SYS_personality, 0x0400000); /* READ_IMPLIES_EXEC */
    CALL("mbind", SYS_mbind, memory, 4096, 0, 0, 0, 0);
    CALL("vmsplice", SYS_vmsplice, null, 0, 0, 0);
#ifdef __x86_64__
    CALL("iopl", SYS_iopl, 3);
    CALL("ioperm", SYS_ioperm, 0x80, 1, 1);
    CALL("modify_ldt", SYS_modify_ldt, 1, memory, 16);
#endif
    return 0;
}
