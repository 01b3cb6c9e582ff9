/*
 * PID 1 of every container.
 *
 *   sandboxd-init [SOCKET]
 *
 * Theory of operation.  The OCI runtime starts this static binary with four capabilities (SETUID,
 * SETGID, SETPCAP, KILL) inside the container's user namespace and one stream socket, the control
 * connection, as descriptor 3; of an engine that passes no descriptors on, it connects to SOCKET, where
 * the daemon accepts one connection.  It empties its bounding set, makes itself undumpable and says HELLO.
 * On SETUP it forks the tool process, which takes the tool's ids, drops every capability, lowers its
 * rlimits, installs the policy's filter and parks on a private socket pair; the filter's listener
 * goes up that pair and on to the daemon (PARKED).  PID 1 then gives up all but KILL and filters
 * itself down to the dozen system calls of its loop.
 *
 * On EXEC it passes the command and its descriptors to the parked process, which executes it; the
 * errno of a failed execve comes back on the pair, a successful one closes it.  After that PID 1
 * reaps and forwards signals.  When the tool has ended it kills whatever else there is, reports how the
 * tool ended, and, then or later, that it is alone.
 *
 * Where SETUP says `keep`, the container serves one command after the other: what a command leaves running
 * lives on, and a further SETUP parks a further process, made as the first was, with a filter and a listener
 * of its own. What forks it cannot have a filter that it would inherit, nor give up the right to take the
 * tool's ids: PID 1 of such a container goes without its own filter and keeps SETUID and SETGID.
 *
 * On WARM, which may come before EXEC, the parked process becomes an interpreter (runner.py) that says
 * on the pair that it is ready (WARMED) and waits there for the command in its stead. Code of the image
 * holds the other end of the pair from then on: PID 1 never waits for it, neither to read nor to write.
 *
 * When the control connection closes or the deadline timer fires PID 1 exits, and the kernel kills
 * everything else in the PID namespace.
 *
 * protocol.py is the other end and describes the frames.  The daemon is trusted; the tool never
 * sees descriptor 3, which is closed in the parked process before any command is known.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define VERSION 1
#define CONTROL 3
#define MAX_PAYLOAD (8u << 20) /* argv and env of one command; execve itself stops at about 6 MiB */
#define MAX_FDS 5
#define STDIO 3 /* stdin, stdout, stderr, in this order before any others */
#define MAX_SAYING 256 /* what an interpreter says of its start */
#define MAX_RLIMITS 16

enum { /* frame types; below 64 from the daemon, from 64 on to it */
    SETUP = 1,
    EXEC = 2,
    SIGNAL = 3,
    EXEC_WARM = 4, /* as EXEC; the interpreter that waits may run it itself */
    WARM = 5,      /* as EXEC, with two more descriptors: the interpreter that shall wait */
    HELLO = 64,
    PARKED = 65,
    STARTED = 66,
    EXEC_FAILED = 67,
    EXITED = 68,
    FAILED = 69,
    WARMED = 70, /* what the interpreter said, or nothing when it has ended */
    ALONE = 71,  /* the tool's whole tree is dead, where EXITED did not say so */
};

struct header {
    uint32_t length; /* of the payload */
    uint16_t type;
    uint16_t version;
    uint32_t exec_id;
};

struct setup { /* followed by `rlimits` struct limit, then the filter's struct sock_filter[] */
    uint32_t uid, gid, umask;
    int32_t oom_score_adj;
    uint32_t rlimits, filter_length; /* of the filter, in instructions */
    uint32_t keep;                   /* the container outlives the command */
};

struct limit {
    uint64_t resource, soft, hard;
};

struct exec { /* followed by cwd, argv and env, each string ended by NUL; stdin, stdout, stderr as rights */
    uint32_t argc, envc;
    uint64_t deadline; /* microseconds from now; 0 for none */
};

struct exited {
    int32_t status; /* as wait(2) gives it */
    uint32_t alone; /* no other process is left */
    uint64_t user, system, max_rss; /* microseconds, microseconds, KiB */
};

static int timer = -1;
static int keep; /* the container outlives its command, and takes another */

/* The payload of the frame at hand. PID 1 never allocates: its own filter has no brk and no mmap. */
static _Alignas(16) char payload[MAX_PAYLOAD + 1];

/* Only what poll(2), wait(2) and the control connection need; anything else is a bug or an attack. */
static struct sock_filter own_filter[] = {
#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#error "no own filter for this architecture"
#endif
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
#define PERMIT(name)                                                                                             \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##name, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
    PERMIT(ppoll),
    PERMIT(read),
    PERMIT(write),
    PERMIT(recvmsg),
    PERMIT(sendmsg),
    PERMIT(wait4),
    PERMIT(kill),
    PERMIT(close),
    PERMIT(timerfd_settime),
    PERMIT(rt_sigprocmask),
    PERMIT(rt_sigreturn),
    PERMIT(restart_syscall),
    PERMIT(exit_group),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
};

static int write_all(int fd, const void *data, size_t size)
{
    for (const char *at = data; size > 0;) {
        ssize_t n = write(fd, at, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

static int read_all(int fd, void *data, size_t size)
{
    for (char *at = data; size > 0;) {
        ssize_t n = read(fd, at, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

/* Sends what it can of one frame; `fds` go with its first byte. Returns how many bytes went. */
static ssize_t send_some(int fd, const struct header *head, const void *payload, const int *fds, size_t count)
{
    struct iovec parts[] = {{.iov_base = (void *)head, .iov_len = sizeof *head},
                            {.iov_base = (void *)payload, .iov_len = head->length}};
    union {
        char bytes[CMSG_SPACE(sizeof(int) * MAX_FDS)];
        struct cmsghdr align;
    } rights = {0};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    if (count > 0) {
        message.msg_control = rights.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * count);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * count);
    }
    ssize_t n;
    do
        n = sendmsg(fd, &message, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n;
}

/* Sends one frame whole, to an end that reads. */
static int send_frame(int fd, uint16_t type, uint32_t exec_id, const void *payload, uint32_t length, const int *fds,
                      size_t count)
{
    struct header head = {.length = length, .type = type, .version = VERSION, .exec_id = exec_id};
    ssize_t n = send_some(fd, &head, payload, fds, count);
    if (n < (ssize_t)sizeof head)
        return -1;
    size_t sent = (size_t)n - sizeof head;
    return write_all(fd, (const char *)payload + sent, length - sent);
}

/* Receives one frame, its payload into `payload`; at most MAX_FDS descriptors. Returns -1 at EOF. */
static int receive_frame(int fd, struct header *head, int *fds, size_t *count)
{
    struct iovec part = {.iov_base = head, .iov_len = sizeof *head};
    union {
        char bytes[CMSG_SPACE(sizeof(int) * MAX_FDS)];
        struct cmsghdr align;
    } rights = {0};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = rights.bytes, .msg_controllen = sizeof rights.bytes};
    ssize_t n;
    *count = 0;
    do
        n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n <= 0)
        return -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            *count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(c), *count * sizeof(int));
        }
    if ((size_t)n < sizeof *head && read_all(fd, (char *)head + n, sizeof *head - (size_t)n) < 0)
        return -1;
    if (head->version != VERSION || head->length > MAX_PAYLOAD)
        return -1;
    if (read_all(fd, payload, head->length) < 0)
        return -1;
    payload[head->length] = 0; /* the last string is ended whatever the sender did */
    return 0;
}

static _Noreturn void fail(int fd, const char *stage)
{
    char text[256];
    int n = snprintf(text, sizeof text, "%d %s", errno, stage);
    send_frame(fd, FAILED, 0, text, (uint32_t)n, NULL, 0);
    _exit(125);
}

static int drop_capabilities(uint32_t keep)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct data[2] = {{.effective = keep, .permitted = keep}, {0}};
    return (int)syscall(SYS_capset, &head, data);
}

static int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int done = write_all(fd, text, strlen(text));
    close(fd);
    return done;
}

/* The next NUL-ended string of a payload that ends at `end`; NULL when there is none. */
static char *next_string(char **at, char *end)
{
    if (*at >= end)
        return NULL;
    char *text = *at;
    *at += strlen(text) + 1;
    return text;
}

/* execvpe(3) as POSIX describes the search, without its fallback to a shell on ENOEXEC. */
static void execute(char **argv, char **env)
{
    if (strchr(argv[0], '/') || argv[0][0] == 0) {
        execve(argv[0], argv, env);
        return;
    }
    const char *path = "/usr/local/bin:/usr/bin:/bin";
    for (char **e = env; *e; e++)
        if (strncmp(*e, "PATH=", 5) == 0)
            path = *e + 5;
    int found = ENOENT;
    size_t name = strlen(argv[0]);
    for (const char *part = path;; part++) {
        size_t length = strcspn(part, ":");
        char file[4096];
        if (length + name + 2 <= sizeof file) {
            memcpy(file, length ? part : ".", length ? length : 1);
            size_t at = length ? length : 1;
            file[at] = '/';
            memcpy(file + at + 1, argv[0], name + 1);
            execve(file, argv, env);
            if (errno == EACCES)
                found = EACCES;
            else if (errno != ENOENT && errno != ENOTDIR)
                return;
        } else {
            found = ENAMETOOLONG;
        }
        part += length;
        if (!*part)
            break;
    }
    errno = found;
}

/* Takes one command from the pair and executes it; returns, with errno, only if that failed. */
static uint16_t become(int pair)
{
    struct header head;
    int fds[MAX_FDS];
    size_t count;
    if (receive_frame(pair, &head, fds, &count) < 0)
        _exit(125);
    int warm = head.type == WARM;
    struct exec exec;
    memcpy(&exec, payload, sizeof exec);
    char *at = payload + sizeof exec, *end = payload + head.length;
    char **argv = calloc(exec.argc + 1, sizeof *argv), **env = calloc(exec.envc + 1, sizeof *env);
    char *cwd = next_string(&at, end);
    errno = EPROTO;
    if (!argv || !env || !cwd || count != (warm ? MAX_FDS : STDIO))
        return head.type;
    for (uint32_t i = 0; i < exec.argc; i++)
        if (!(argv[i] = next_string(&at, end)))
            return head.type;
    for (uint32_t i = 0; i < exec.envc; i++)
        if (!(env[i] = next_string(&at, end)))
            return head.type;
    /* Each was received at a number beyond its place: the pair is the highest that was open. */
    for (int i = 0; i < (int)count; i++)
        if (dup2(fds[i], i < STDIO ? i : i + 1) < 0)
            return head.type;
    if (chdir(cwd) < 0)
        return head.type;
    if (warm)
        fcntl(pair, F_SETFD, 0);
    execute(argv, env);
    int number = errno;
    fcntl(pair, F_SETFD, FD_CLOEXEC);
    syscall(SYS_close_range, (unsigned)pair + 1, ~0U, 0);
    errno = number;
    return head.type;
}

/* The parked process from the moment that its filter is in force: wait for a command, become it. */
static _Noreturn void parked(int pair)
{
    while (become(pair) == WARM) { /* no such interpreter: what waits is this process, as ever */
        char text[MAX_SAYING];
        int n = snprintf(text, sizeof text, "not ready: it cannot be executed: %s", strerror(errno));
        write_all(pair, text, (size_t)n);
    }
    int32_t number = errno;
    write_all(pair, &number, sizeof number);
    _exit(127);
}

/* Forks the tool process and waits until it is parked; its listener goes to the daemon. */
static pid_t park(uint32_t length, int *pair)
{
    struct setup setup;
    if (length < sizeof setup)
        return errno = EPROTO, -1;
    memcpy(&setup, payload, sizeof setup);
    if (setup.rlimits > MAX_RLIMITS ||
        length != sizeof setup + setup.rlimits * sizeof(struct limit) + setup.filter_length * sizeof(struct sock_filter))
        return errno = EPROTO, -1;
    keep = setup.keep != 0;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return -1;
    pid_t pid = fork();
    if (pid != 0) {
        close(ends[1]);
        *pair = ends[0];
        return pid;
    }
    int up = ends[1];
    if (up != CONTROL && dup3(up, CONTROL, O_CLOEXEC) < 0) /* closes the control connection here */
        fail(up, "dup3");
    up = CONTROL;
    if (syscall(SYS_close_range, CONTROL + 1, ~0U, 0) < 0)
        fail(up, "close_range");
    char text[16];
    snprintf(text, sizeof text, "%d", setup.oom_score_adj);
    if (write_file("/proc/self/oom_score_adj", text) < 0)
        fail(up, "oom_score_adj");
    sigset_t none;
    sigemptyset(&none);
    if (setsid() < 0 || sigprocmask(SIG_SETMASK, &none, NULL) < 0)
        fail(up, "setsid");
    for (int number = 1; number < NSIG; number++) /* what started the daemon (nohup, a script) may ignore some */
        signal(number, SIG_DFL);
    char *at = payload + sizeof setup;
    for (uint32_t i = 0; i < setup.rlimits; i++, at += sizeof(struct limit)) {
        struct limit limit;
        memcpy(&limit, at, sizeof limit);
        struct rlimit value = {.rlim_cur = limit.soft, .rlim_max = limit.hard};
        if (setrlimit((int)limit.resource, &value) < 0)
            fail(up, "setrlimit");
    }
    umask(setup.umask);
    if (setgroups(0, NULL) < 0 || setresgid(setup.gid, setup.gid, setup.gid) < 0 ||
        setresuid(setup.uid, setup.uid, setup.uid) < 0)
        fail(up, "setuid");
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0) /* what an earlier command left has the same ids */
        fail(up, "dumpable");
    if (drop_capabilities(0) < 0)
        fail(up, "capset");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        fail(up, "no_new_privs");
    struct sock_fprog program = {.len = (unsigned short)setup.filter_length, .filter = (struct sock_filter *)at};
    unsigned flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | (1u << 5) /* WAIT_KILLABLE_RECV, Linux 5.19 */;
    int listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    if (listener < 0)
        fail(up, "seccomp");
    if (send_frame(up, PARKED, 0, NULL, 0, &listener, 1) < 0)
        _exit(125);
    close(listener);
    parked(up);
}

static void report_exit(int status, const struct rusage *used, int alone)
{
    struct exited exited = {
        .status = status,
        .alone = (uint32_t)alone,
        .user = (uint64_t)used->ru_utime.tv_sec * 1000000u + (uint64_t)used->ru_utime.tv_usec,
        .system = (uint64_t)used->ru_stime.tv_sec * 1000000u + (uint64_t)used->ru_stime.tv_usec,
        .max_rss = (uint64_t)used->ru_maxrss,
    };
    send_frame(CONTROL, EXITED, 0, &exited, sizeof exited, NULL, 0);
}

/* The private pair with the parked process, what is awaited on it, and what it has not taken yet. */
static struct {
    int fd;
    enum { NOTHING, SAYING, ANSWER } awaited;
    uint32_t exec_id;
    size_t got; /* of an answer */
    char bytes[MAX_SAYING];
    size_t sent, size; /* of `rest` */
    char rest[MAX_PAYLOAD];
} pair; /* its descriptor is set in main: a value here would put all of it into the binary */

static void close_pair(void)
{
    close(pair.fd);
    pair.fd = -1;
    pair.awaited = NOTHING;
    pair.sent = pair.size = 0;
}

/* The command cannot have been taken: whoever should have has closed the pair. */
static void untaken(void)
{
    int32_t number = EPIPE;
    send_frame(CONTROL, EXEC_FAILED, pair.exec_id, &number, sizeof number, NULL, 0);
    if (pair.fd >= 0)
        close_pair();
}

/* Writes what the pair takes now of a command that it did not take whole. */
static void go_on(void)
{
    while (pair.sent < pair.size) {
        ssize_t n = write(pair.fd, pair.rest + pair.sent, pair.size - pair.sent);
        if (n > 0)
            pair.sent += (size_t)n;
        else if (errno == EAGAIN)
            return;
        else if (errno != EINTR) {
            pair.sent = pair.size = 0; /* what an interpreter that starts has to say is still awaited */
            if (pair.awaited == ANSWER)
                untaken();
        }
    }
}

/* Hears what is there, and no more: whoever is on the other end may be anybody. */
static void hear(void)
{
    struct pollfd polled = {.fd = pair.fd, .events = POLLIN};
    struct timespec now = {0};
    if (pair.awaited == NOTHING || ppoll(&polled, 1, &now, NULL) <= 0)
        return;
    size_t room = pair.awaited == SAYING ? sizeof pair.bytes : sizeof(int32_t) - pair.got;
    ssize_t n = read(pair.fd, pair.bytes + pair.got, room);
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (pair.awaited == SAYING) {
        send_frame(CONTROL, WARMED, pair.exec_id, pair.bytes, n > 0 ? (uint32_t)n : 0, NULL, 0);
        pair.awaited = NOTHING;
    } else if (n <= 0 && pair.sent < pair.size) {
        untaken();
    } else if (n <= 0) {
        send_frame(CONTROL, STARTED, pair.exec_id, NULL, 0, NULL, 0);
        close_pair();
    } else if ((pair.got += (size_t)n) == sizeof(int32_t)) {
        send_frame(CONTROL, EXEC_FAILED, pair.exec_id, pair.bytes, sizeof(int32_t), NULL, 0);
        close_pair();
    }
}

/* The deadline is that of a command, and not of what it left. */
static void rest(void)
{
    struct itimerspec never = {0};
    timerfd_settime(timer, 0, &never, NULL);
    if (pair.fd >= 0)
        close_pair();
}

/* Reaps what is there; at the end of the tool everything else is killed, none of which can fork any more.
 * A container that is kept is ready for another command then: nobody is the tool. */
static void reap(pid_t *tool)
{
    static int ended, told;
    int status, tool_status = 0, now = 0;
    struct rusage used, tool_used = {0};
    pid_t pid;
    while ((pid = wait4(-1, &status, WNOHANG, &used)) > 0)
        if (pid == *tool) {
            hear(); /* what it said, it said before it ended */
            if (keep) {
                rest();
                *tool = 0;
            } else {
                kill(-1, SIGKILL);
            }
            tool_status = status;
            tool_used = used;
            ended = now = 1;
        }
    int alone = ended && pid < 0; /* no child is left: orphans become children of PID 1 */
    if (now)
        report_exit(tool_status, &tool_used, alone);
    else if (alone && !told && !keep)
        send_frame(CONTROL, ALONE, 0, NULL, 0, NULL, 0);
    told = told || alone;
}

/* Passes a command on; the parked process answers with an errno, or closes the pair by execve. */
static void pass_on(const struct header *head, const int *fds, size_t count)
{
    struct exec exec;
    if (head->length < sizeof exec || count != (head->type == WARM ? MAX_FDS : STDIO)) {
        errno = EPROTO;
        fail(CONTROL, "exec frame");
    }
    memcpy(&exec, payload, sizeof exec);
    struct itimerspec when = {.it_value = {.tv_sec = (time_t)(exec.deadline / 1000000u),
                                           .tv_nsec = (long)(exec.deadline % 1000000u) * 1000}};
    if (timerfd_settime(timer, 0, &when, NULL) < 0)
        fail(CONTROL, "timerfd_settime");
    ssize_t sent = send_some(pair.fd, head, payload, fds, count);
    for (size_t i = 0; i < count; i++)
        close(fds[i]);
    pair.exec_id = head->exec_id;
    pair.got = 0;
    pair.awaited = head->type == WARM ? SAYING : ANSWER;
    if (sent >= (ssize_t)sizeof *head) {
        pair.sent = 0;
        pair.size = sizeof *head + head->length - (size_t)sent;
        memcpy(pair.rest, payload + head->length - pair.size, pair.size);
    } else if (head->type != WARM) {
        untaken();
    }
}

/* Makes the control connection to the daemon's socket at `path`. */
static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return errno = ENAMETOOLONG, -1;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return -1;
    return dup2(fd, CONTROL);
}

int main(int argc, char **argv)
{
    if (argc == 2 && connect_to(argv[1]) < 0)
        _exit(125); /* nobody can be told but by the status */
    for (int cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0)
            fail(CONTROL, "bounding set");
    if (drop_capabilities(1u << CAP_SETUID | 1u << CAP_SETGID | 1u << CAP_KILL) < 0)
        fail(CONTROL, "capset");
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        fail(CONTROL, "prctl");
    pair.fd = -1;
    fcntl(CONTROL, F_SETFD, FD_CLOEXEC);
    syscall(SYS_close_range, CONTROL + 1, ~0U, 0);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_DFL); /* ignored where the daemon was started, it would keep the end of the tool from us */
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    int signals = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    timer = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK);
    if (signals < 0 || timer < 0)
        fail(CONTROL, "signalfd");
    if (send_frame(CONTROL, HELLO, 0, NULL, 0, NULL, 0) < 0)
        _exit(125);

    pid_t tool = 0;
    for (;;) {
        struct pollfd polled[] = {{.fd = CONTROL, .events = POLLIN},
                                  {.fd = signals, .events = POLLIN},
                                  {.fd = timer, .events = POLLIN},
                                  {.fd = pair.awaited == NOTHING ? -1 : pair.fd,
                                   .events = pair.sent < pair.size ? POLLIN | POLLOUT : POLLIN}};
        if (ppoll(polled, 4, NULL, NULL) < 0) {
            if (errno == EINTR)
                continue;
            fail(CONTROL, "ppoll");
        }
        if (polled[2].revents)
            _exit(124); /* the daemon should have ended this call long ago */
        if (polled[3].revents & POLLOUT)
            go_on();
        if (polled[3].revents & ~POLLOUT)
            hear();
        if (polled[1].revents) {
            struct signalfd_siginfo info;
            while (read(signals, &info, sizeof info) > 0)
                ;
            reap(&tool);
        }
        if (!polled[0].revents)
            continue;
        struct header head;
        int fds[MAX_FDS];
        size_t count;
        if (receive_frame(CONTROL, &head, fds, &count) < 0)
            _exit(125); /* the daemon is gone */
        if (head.type == SETUP && tool == 0) {
            tool = park(head.length, &pair.fd);
            if (tool < 0)
                fail(CONTROL, "fork");
            struct header up;
            if (receive_frame(pair.fd, &up, fds, &count) < 0) {
                errno = EPIPE;
                fail(CONTROL, "park");
            }
            fcntl(pair.fd, F_SETFL, O_NONBLOCK);
            if (keep) { /* which one it is among what others left: the daemon numbers them otherwise */
                if (up.type == PARKED && (fds[count++] = (int)syscall(SYS_pidfd_open, tool, 0)) < 0)
                    fail(CONTROL, "pidfd_open");
            } else {
                int kept = drop_capabilities(1u << CAP_KILL);
                struct sock_fprog own = {.len = sizeof own_filter / sizeof *own_filter, .filter = own_filter};
                if (kept < 0 || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &own) < 0)
                    fail(CONTROL, "own filter");
            }
            send_frame(CONTROL, up.type, 0, payload, up.length, fds, count);
            for (size_t i = 0; i < count; i++)
                close(fds[i]);
        } else if ((head.type == EXEC || head.type == EXEC_WARM || head.type == WARM) && pair.fd >= 0 &&
                   pair.awaited == NOTHING) {
            pass_on(&head, fds, count);
        } else if (head.type == EXEC && keep && tool == 0) { /* what an earlier command left has killed it */
            for (size_t i = 0; i < count; i++)
                close(fds[i]);
            pair.exec_id = head.exec_id;
            untaken();
        } else if (head.type == SIGNAL && (tool > 0 || keep) && head.length == sizeof(int32_t)) {
            int32_t number;
            memcpy(&number, payload, sizeof number);
            if (tool > 0) /* else it has ended, and its number may be another's */
                kill(-tool, number); /* the tool leads its own session and process group */
        } else {
            errno = EPROTO;
            fail(CONTROL, "frame");
        }
    }
}
