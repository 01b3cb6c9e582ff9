/*
 * The built-in container runtime: everything between a cgroup and our PID 1, in one small process.
 *
 *   sandboxd-container PLAN_FD CONTROL_FD USERNS_FD own|host DIRECTORY PROCS... -- MASKED... -- READ_ONLY... -- NAME
 *
 * Theory of operation.  What no container differs in is done ahead of time: the process joins the named
 * cgroups and the user namespace, becomes its root, makes all other namespaces, and forks; with `host` for
 * its network, it stays in that of the host, of which it may change nothing.  The parent
 * sends the child's pid and pidfd over PLAN_FD and ends.  The child is the first process of the PID
 * namespace; on a tmpfs at DIRECTORY, which it alone sees, it makes /dev and /proc with what is masked
 * there, and waits.  One packet on PLAN_FD is the plan: strings ended by NUL, and detached mounts as
 * descriptors in the order in which the plan names them.
 *
 *   hostname NAME            sethostname(2)
 *   root                     the next descriptor is the root file system
 *   prepared PATH            /dev or /proc, moved to PATH
 *   mount PATH               the next descriptor, at PATH
 *   tmpfs PATH OPTION... ""  a new tmpfs, nosuid, nodev, and noexec if an option says so
 *   sealed                   the root becomes read-only: nothing is mounted after it
 *
 * Then it leaves the host's file systems by pivot_root(2), keeps four capabilities (those of INIT_CAPABILITIES
 * in bundle.py), and executes /dev/.sandboxd, the init of the engine.  EOF on PLAN_FD is the daemon's end,
 * and this one's.
 *
 * Paths of the image are resolved beneath the new root (openat2(2), RESOLVE_IN_ROOT), so that no link of an
 * image leads out of it.  What went wrong is said on stderr, which is the engine's.  Nothing here is trusted
 * to have worked: the daemon reads every control back from the kernel before a command is handed over.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <net/if.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CONTROL 3
#define MAX_PLAN (1u << 17) /* 64 lent paths of 4 KiB would not fit: the engine says so */
#define MAX_MOUNTS 128
#define UMOUNT_DETACH 2 /* MNT_DETACH of sys/mount.h, which clashes with linux/mount.h */
#define SEALED (MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)

static const char *const devices[] = {"null", "zero", "full", "random", "urandom", "tty"};
static const char *const links[][2] = {{"/proc/self/fd", "fd"},
                                       {"/proc/self/fd/0", "stdin"},
                                       {"/proc/self/fd/1", "stdout"},
                                       {"/proc/self/fd/2", "stderr"},
                                       {"pts/ptmx", "ptmx"}};
static const unsigned kept[] = {CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP};

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "sandboxd-container: %.200s: %s\n", what, strerror(errno));
    _exit(125);
}

static int must(int result, const char *what)
{
    if (result < 0)
        fail(what);
    return result;
}

static void write_text(const char *path, const char *text)
{
    int fd = must(open(path, O_WRONLY | O_CLOEXEC), path);
    must((int)write(fd, text, strlen(text)), path);
    close(fd);
}

/* A detached mount of a new file system; an option is KEY=VALUE. `options` ends with NULL. */
static int new_mount(const char *kind, unsigned attributes, const char *const *options)
{
    int context = must((int)syscall(SYS_fsopen, kind, FSOPEN_CLOEXEC), kind);
    for (; *options; options++) {
        char key[64];
        const char *value = strchr(*options, '=');
        if (!value || (size_t)(value - *options) >= sizeof key)
            errno = EINVAL, fail(*options);
        memcpy(key, *options, (size_t)(value - *options));
        key[value - *options] = 0;
        must((int)syscall(SYS_fsconfig, context, FSCONFIG_SET_STRING, key, value + 1, 0), *options);
    }
    must((int)syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0), kind);
    int mount = must((int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, attributes), kind);
    close(context);
    return mount;
}

static int clone_tree(int at, const char *path)
{
    unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW;
    return must((int)syscall(SYS_open_tree, at, path, flags), path);
}

static void set_attributes(int mount, unsigned attributes, const char *what)
{
    struct mount_attr wanted = {.attr_set = attributes};
    must((int)syscall(SYS_mount_setattr, mount, "", AT_EMPTY_PATH, &wanted, sizeof wanted), what);
}

static void attach(int mount, int place, const char *what)
{
    unsigned flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    must((int)syscall(SYS_move_mount, mount, "", place, "", flags), what);
}

/* A path beneath `root`, whatever links are on the way. */
static int open_inside(int root, const char *path, unsigned flags)
{
    struct open_how how = {.flags = O_PATH | O_CLOEXEC | flags, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

/* The place for a mount, made where the root is a writable one that lacks it. */
static int place_for(int root, const char *path, bool directory)
{
    int place = open_inside(root, path, 0);
    if (place >= 0 || errno != ENOENT)
        return must(place, path);
    char part[4096];
    if (strlen(path) >= sizeof part)
        errno = ENAMETOOLONG, fail(path);
    int above = must(dup(root), path);
    for (const char *at = path + 1;; at++) {
        at += strcspn(at, "/");
        memcpy(part, path, (size_t)(at - path));
        part[at - path] = 0;
        place = open_inside(root, part, 0);
        if (place < 0 && errno == ENOENT) {
            const char *name = strrchr(part, '/') + 1;
            if (*at || directory)
                must(mkdirat(above, name, 0755), path);
            else
                close(must(openat(above, name, O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC | O_WRONLY, 0644), path));
            place = openat(above, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
        }
        close(above);
        above = must(place, path);
        if (!*at)
            return place;
    }
}

static bool is_directory(int fd)
{
    struct stat found;
    return fstat(fd, &found) == 0 && S_ISDIR(found.st_mode);
}

static void make_dev(void)
{
    int mount = new_mount("tmpfs", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, (const char *[]){"mode=755", "size=64k", NULL});
    must(mkdir("dev", 0755), "dev");
    must((int)syscall(SYS_move_mount, mount, "", AT_FDCWD, "dev", MOVE_MOUNT_F_EMPTY_PATH), "dev");
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
        char host[32], path[32];
        snprintf(host, sizeof host, "/dev/%s", devices[i]);
        snprintf(path, sizeof path, "dev/%s", devices[i]);
        int file = must(openat(mount, devices[i], O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666), path);
        int node = clone_tree(AT_FDCWD, host);
        attach(node, file, path);
        close(node);
        close(file);
    }
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        must(symlinkat(links[i][0], mount, links[i][1]), links[i][1]);
    must(mkdirat(mount, "pts", 0755) | mkdirat(mount, "shm", 0755), "dev/pts");
    close(must(openat(mount, ".sandboxd", O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0755), "dev/.sandboxd"));
    int pts = new_mount("devpts", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC,
                        (const char *[]){"ptmxmode=0666", "mode=0620", "max=64", NULL});
    must((int)syscall(SYS_move_mount, pts, "", mount, "pts", MOVE_MOUNT_F_EMPTY_PATH), "dev/pts");
    close(pts);
    close(mount);
}

/* `at` lists masked paths, "--", and read-only ones, all below /proc; those that this kernel lacks are left. */
static void make_proc(char **at)
{
    int mount = new_mount("proc", SEALED, (const char *[]){"hidepid=invisible", NULL});
    must(mkdir("proc", 0555), "proc");
    must((int)syscall(SYS_move_mount, mount, "", AT_FDCWD, "proc", MOVE_MOUNT_F_EMPTY_PATH), "proc");
    bool masked = true;
    for (; *at; at++) {
        if (strcmp(*at, "--") == 0) {
            if (!masked)
                break;
            masked = false;
            continue;
        }
        int place = open_inside(mount, *at + strlen("/proc"), O_NOFOLLOW);
        if (place < 0 && errno == ENOENT)
            continue;
        must(place, *at);
        int cover;
        if (!masked)
            set_attributes(cover = clone_tree(place, ""), SEALED | MOUNT_ATTR_RDONLY, *at);
        else if (is_directory(place))
            cover = new_mount("tmpfs", SEALED | MOUNT_ATTR_RDONLY, (const char *[]){"size=4k", "nr_inodes=1", "mode=555", NULL});
        else
            cover = clone_tree(AT_FDCWD, "/dev/null");
        attach(cover, place, *at);
        close(cover);
        close(place);
    }
    close(mount);
}

static void raise_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    int fd = must(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");
    must(ioctl(fd, SIOCGIFFLAGS, &request), "lo");
    request.ifr_flags |= IFF_UP;
    must(ioctl(fd, SIOCSIFFLAGS, &request), "lo");
    close(fd);
}

/* Receives the plan; ends this process when the daemon has gone or needs it no more. */
static size_t receive_plan(int fd, char *plan, int *mounts, size_t *count)
{
    struct iovec part = {.iov_base = plan, .iov_len = MAX_PLAN};
    static union {
        char bytes[CMSG_SPACE(sizeof(int) * MAX_MOUNTS)];
        struct cmsghdr align;
    } rights;
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = rights.bytes, .msg_controllen = sizeof rights.bytes};
    ssize_t n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    if (n <= 0)
        _exit(125);
    if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        errno = EMSGSIZE, fail("plan");
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            *count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(mounts, CMSG_DATA(c), *count * sizeof(int));
        }
    plan[n] = 0; /* the last string is ended whatever was sent */
    return (size_t)n;
}

static const char *next_string(char **at, const char *end)
{
    if (*at >= end)
        errno = EPROTO, fail("plan");
    const char *text = *at;
    *at += strlen(text) + 1;
    return text;
}

/* Executes the plan; returns the new root. */
static int build(char *plan, const char *end, const int *mounts, size_t count)
{
    int root = -1;
    size_t used = 0;
    while (plan < end) {
        const char *what = next_string(&plan, end);
        if (strcmp(what, "hostname") == 0) {
            const char *name = next_string(&plan, end);
            must(sethostname(name, strlen(name)), "hostname");
        } else if (strcmp(what, "root") == 0 && used < count) {
            must(mkdir("root", 0755), "root");
            must((int)syscall(SYS_move_mount, mounts[used++], "", AT_FDCWD, "root", MOVE_MOUNT_F_EMPTY_PATH), "root");
            root = must(open("root", O_PATH | O_DIRECTORY | O_CLOEXEC), "root");
        } else if (strcmp(what, "prepared") == 0) {
            const char *path = next_string(&plan, end);
            int place = place_for(root, path, true);
            unsigned flags = MOVE_MOUNT_T_EMPTY_PATH;
            must((int)syscall(SYS_move_mount, AT_FDCWD, path + 1, place, "", flags), path);
            close(place);
        } else if (strcmp(what, "mount") == 0 && used < count) {
            const char *path = next_string(&plan, end);
            int place = place_for(root, path, is_directory(mounts[used]));
            attach(mounts[used++], place, path);
            close(place);
        } else if (strcmp(what, "tmpfs") == 0) {
            const char *path = next_string(&plan, end), *options[8];
            unsigned attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
            size_t n = 0;
            for (const char *option; *(option = next_string(&plan, end));)
                if (strcmp(option, "noexec") == 0)
                    attributes |= MOUNT_ATTR_NOEXEC;
                else if (n + 1 < sizeof options / sizeof *options)
                    options[n++] = option;
                else
                    errno = E2BIG, fail(path);
            options[n] = NULL;
            int place = place_for(root, path, true), mount = new_mount("tmpfs", attributes, options);
            attach(mount, place, path);
            close(mount);
            close(place);
        } else if (strcmp(what, "sealed") == 0) {
            set_attributes(root, MOUNT_ATTR_RDONLY, "root");
        } else {
            errno = EPROTO;
            fail(what);
        }
    }
    return root;
}

static void keep_four_capabilities(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct data[2] = {{0}, {0}};
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
        data[0].effective |= 1u << kept[i];
    data[0].permitted = data[0].effective;
    for (unsigned cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
        if (cap >= 32 || !(data[0].effective & 1u << cap))
            must(prctl(PR_CAPBSET_DROP, cap, 0, 0, 0), "bounding set");
    must(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "ambient set");
    must((int)syscall(SYS_capset, &head, data), "capset");
    must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
}

/* The child: PID 1 to be. */
static _Noreturn void contain(int plan_fd, int control, bool own_network, const char *directory, char **masks)
{
    static char plan[MAX_PLAN + 1];
    int mounts[MAX_MOUNTS];
    size_t count = 0;
    umask(022);
    must(setsid(), "setsid");
    must((int)syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL), "keyring");
    struct mount_attr private = {.propagation = MS_PRIVATE};
    must((int)syscall(SYS_mount_setattr, AT_FDCWD, "/", AT_RECURSIVE, &private, sizeof private), "private mounts");
    int scratch = new_mount("tmpfs", SEALED, (const char *[]){"mode=755", "size=16k", NULL});
    must((int)syscall(SYS_move_mount, scratch, "", AT_FDCWD, directory, MOVE_MOUNT_F_EMPTY_PATH), directory);
    must(fchdir(scratch), directory);
    close(scratch);
    if (own_network)
        raise_loopback();
    make_dev();
    make_proc(masks);
    size_t size = receive_plan(plan_fd, plan, mounts, &count);
    int root = build(plan, plan + size, mounts, count);
    must(fchdir(root), "root");
    must((int)syscall(SYS_pivot_root, ".", "."), "pivot_root"); /* the old root is now on top of the new */
    must((int)syscall(SYS_umount2, ".", UMOUNT_DETACH), "old root");
    must(chdir("/"), "/");
    keep_four_capabilities();
    must(control == CONTROL ? fcntl(CONTROL, F_SETFD, 0) : dup2(control, CONTROL), "control connection");
    must((int)syscall(SYS_close_range, CONTROL + 1, ~0u, 0), "close_range");
    execve("/dev/.sandboxd", (char *[]){"/dev/.sandboxd", NULL}, (char *[]){NULL});
    fail("/dev/.sandboxd");
}

static void send_child(int fd, pid_t pid)
{
    int pidfd = must((int)syscall(SYS_pidfd_open, pid, 0), "pidfd_open");
    struct iovec part = {.iov_base = &pid, .iov_len = sizeof pid};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } rights = {0};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = rights.bytes, .msg_controllen = sizeof rights.bytes};
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof pidfd);
    memcpy(CMSG_DATA(c), &pidfd, sizeof pidfd);
    must((int)sendmsg(fd, &message, MSG_NOSIGNAL), "engine");
}

int main(int argc, char **argv)
{
    if (argc < 8)
        return errno = EINVAL, fail("arguments"), 125;
    int plan = atoi(argv[1]), control = atoi(argv[2]), userns = atoi(argv[3]);
    bool own_network = strcmp(argv[4], "host") != 0;
    char **at = argv + 6;
    for (; *at && strcmp(*at, "--") != 0; at++)
        write_text(*at, "0");
    if (!*at)
        return errno = EINVAL, fail("arguments"), 125;
    must(setns(userns, CLONE_NEWUSER), "user namespace");
    close(userns);
    must(setgroups(0, NULL), "setgroups");
    must(setresgid(0, 0, 0), "setresgid");
    must(setresuid(0, 0, 0), "setresuid");
    int network = own_network ? CLONE_NEWNET : 0;
    must(unshare(CLONE_NEWNS | CLONE_NEWPID | network | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP), "unshare");
    pid_t child = must(fork(), "fork");
    if (child == 0)
        contain(plan, control, own_network, argv[5], at + 1);
    send_child(plan, child);
    return 0;
}
