/* PID 1, terminals, devices, identities, limits: what a tool without a capability may still try. */
#include "attack.h"
#include <sched.h>
#include <linux/capability.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

static int put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);
    if (fd < 0)
        return -1;
    ssize_t n = write(fd, text, strlen(text));
    int number = errno;
    close(fd);
    errno = number;
    return n < 0 ? -1 : 0;
}

/* 0 only if there is something to read. */
static int leaks(const char *path)
{
    char byte;
    int fd = open(path, O_RDONLY | O_NONBLOCK);
    ssize_t n = fd < 0 ? -1 : read(fd, &byte, 1);
    if (n == 0)
        errno = ENODATA;
    return n > 0 ? 0 : -1;
}

int main(void)
{
    struct rlimit limit = {1 << 20, 1 << 20};
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(0, &cpus);

    TRY("kill 1 TERM", kill(1, SIGTERM));
    TRY("kill 1 KILL", kill(1, SIGKILL));
    TRY("kill 1 STOP", kill(1, SIGSTOP));
    TRY("kill 1 CONT", kill(1, SIGCONT));
    TRY("kill everybody", kill(-1, SIGKILL)); /* but PID 1 and oneself: there is nobody else */
    CALL("tgkill 1", SYS_tgkill, 1, 1, SIGKILL);
    CALL("rt_sigqueueinfo 1", SYS_rt_sigqueueinfo, 1, SIGTERM, &(siginfo_t){.si_code = SI_QUEUE});
    int pidfd = (int)syscall(SYS_pidfd_open, 1, 0);
    CALL("pidfd_send_signal 1", SYS_pidfd_send_signal, pidfd, SIGKILL, 0, 0);
    CALL("prlimit64 1", SYS_prlimit64, 1, RLIMIT_NOFILE, &limit, 0);
    CALL("prlimit64 self raise", SYS_prlimit64, 0, RLIMIT_NOFILE, &(struct rlimit){1 << 20, 1 << 20}, 0);
    CALL("core raise", SYS_prlimit64, 0, RLIMIT_CORE, &limit, 0);
    TRY("setpriority 1", setpriority(PRIO_PROCESS, 1, 19));
    TRY("nice up", setpriority(PRIO_PROCESS, 0, -20));
    TRY("affinity 1", sched_setaffinity(1, sizeof cpus, &cpus));
    TRY("scheduler fifo", sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1}));

    TRY("oom_score_adj down", put("/proc/self/oom_score_adj", "-1000"));
    TRY("sysrq", put("/proc/sysrq-trigger", "h"));
    TRY("core_pattern", put("/proc/sys/kernel/core_pattern", "|/bin/sh"));
    TRY("hostname sysctl", put("/proc/sys/kernel/hostname", "x"));
    TRY("userns sysctl", put("/proc/sys/user/max_user_namespaces", "10"));
    TRY("ip_forward", put("/proc/sys/net/ipv4/ip_forward", "1"));
    TRY("drop_caches", put("/proc/sys/vm/drop_caches", "1"));
    TRY("uid_map", put("/proc/self/uid_map", "0 0 1"));
    TRY("setgroups", put("/proc/self/setgroups", "allow"));
    TRY("pressure", put("/proc/pressure/cpu", "some 150000 2000000"));
    TRY("proc irq", put("/proc/irq/default_smp_affinity", "1"));
    TRY("sys uevent", open("/sys/kernel/uevent_helper", O_WRONLY));
    TRY("cgroupfs", open("/sys/fs/cgroup", O_RDONLY));
    TRY("kcore", leaks("/proc/kcore"));
    TRY("kmsg of proc", leaks("/proc/kmsg"));
    TRY("kallsyms", leaks("/proc/kallsyms"));
    TRY("keys", leaks("/proc/keys"));
    TRY("timer_list", leaks("/proc/timer_list"));
    TRY("slabinfo", leaks("/proc/slabinfo"));
    TRY("vmallocinfo", leaks("/proc/vmallocinfo"));
    TRY("pagemap of 1", leaks("/proc/1/pagemap"));
    TRY("kpagecount", leaks("/proc/kpagecount"));
    TRY("kmsg of dev", open("/dev/kmsg", O_WRONLY));
    TRY("mem", open("/dev/mem", O_RDONLY));
    TRY("kvm", open("/dev/kvm", O_RDWR));
    TRY("fuse", open("/dev/fuse", O_RDWR));
    TRY("net tun", open("/dev/net/tun", O_RDWR));
    TRY("disk", open("/dev/vda", O_RDONLY));
    TRY("vsock dev", open("/dev/vsock", O_RDONLY));
    TRY("root of 1", open("/proc/1/root", O_RDONLY));
    TRY("root of 1 below", open("/proc/1/root/etc/shadow", O_RDONLY));
    TRY("environ of 1", open("/proc/1/environ", O_RDONLY));
    TRY("mem of 1", open("/proc/1/mem", O_RDWR));
    TRY("fd of 1", open("/proc/1/fd/3", O_RDWR));
    TRY("cwd of 1", open("/proc/1/cwd", O_RDONLY));
    TRY("map_files of 1", open("/proc/1/map_files", O_RDONLY));
    TRY("above root", open("/../../../../etc/hostname.of.the.host", O_RDONLY));
    TRY("shadow", open("/etc/shadow", O_RDONLY));
    TRY("docker socket", open("/run/docker.sock", O_RDWR));

    TRY("mknod character", mknod("c", S_IFCHR | 0666, makedev(1, 3)));
    TRY("mknod block", mknod("b", S_IFBLK | 0666, makedev(254, 0)));
    CALL("mknodat high bits", SYS_mknodat, AT_FDCWD, "d", 0xffffffff00000000ul | S_IFCHR | 0666, makedev(1, 1));
    TRY("chmod null", chmod("/dev/null", 0600));
    TRY("chown null", chown("/dev/null", 1000, 1000));
    TRY("unlink null", unlink("/dev/null"));
    TRY("init write", open("/dev/.sandboxd", O_WRONLY));
    TRY("init unlink", unlink("/dev/.sandboxd"));
    TRY("root write", open("/new", O_WRONLY | O_CREAT, 0600));
    TRY("usr write", open("/usr/bin/env", O_WRONLY));
    TRY("etc write", open("/etc/passwd", O_WRONLY));
    TRY("dev write", open("/dev/new", O_WRONLY | O_CREAT, 0600));
    TRY("run write", open("/run/new", O_WRONLY | O_CREAT, 0600));
    TRY("var write", open("/var/tmp/new", O_WRONLY | O_CREAT, 0600));

    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{.effective = ~0u, .permitted = ~0u, .inheritable = ~0u}};
    CALL("capset", SYS_capset, &head, data);
    TRY("setuid 0", setuid(0));
    TRY("setgid 0", setgid(0));
    TRY("setgroups 0", syscall(SYS_setgroups, 1, &(gid_t){0}));

    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    int slave = -1;
    if (terminal >= 0 && grantpt(terminal) == 0 && unlockpt(terminal) == 0)
        slave = open(ptsname(terminal), O_RDWR);
    CALL("TIOCSTI", SYS_ioctl, slave, 0x5412, "x");
    CALL("TIOCSTI high bits", SYS_ioctl, slave, 0xffffffff00005412ul, "x");
    CALL("TIOCLINUX", SYS_ioctl, slave, 0x541c, "\2");
    CALL("TIOCSETD", SYS_ioctl, slave, 0x5423, &(int){3});
    TRY("controlling terminal", open("/dev/tty", O_RDWR));
    return 0;
}
