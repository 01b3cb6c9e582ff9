/*
 * What has to happen in a fresh, single-threaded process on the host's side of a container.
 *
 *   sandboxd-launch run GO_FD CONTROL_FD CGROUP_PROCS... -- RUNTIME ARG...
 *       joins the named cgroups, waits for a byte on GO_FD (its EOF is the daemon's end), makes
 *       CONTROL_FD descriptor 3, and executes the OCI runtime, so that the runtime and all that it
 *       makes are inside the container's cgroup from the start.
 *
 *   sandboxd-launch userns OWNER
 *       makes a user namespace that belongs to the host uid OWNER, writes a line, waits for a line (the
 *       parent has written the id maps), closes the door to further user namespaces below it, writes a
 *       line, and waits for EOF (the parent has opened the namespace).
 *
 *       What is counted per user (inotify instances and watches, pending signals, message queues) is
 *       counted for the owner of the namespace too, in the namespace above: of one owner, containers
 *       would use up each other's share, and root's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = write(fd, text, strlen(text));
    close(fd);
    return n < 0 ? -1 : 0;
}

static int fail(const char *what)
{
    fprintf(stderr, "sandboxd-launch: %s: %s\n", what, strerror(errno));
    return 125;
}

static int run(char **argv)
{
    int go = atoi(argv[0]), control = atoi(argv[1]);
    char **at = argv + 2, byte;
    for (; *at && strcmp(*at, "--") != 0; at++)
        if (write_text(*at, "0") < 0)
            return fail(*at);
    if (!*at || !at[1])
        return errno = EINVAL, fail("run");
    if (read(go, &byte, 1) != 1)
        return 125;
    close(go);
    if (control == 3 ? fcntl(3, F_SETFD, 0) < 0 : dup2(control, 3) < 0)
        return fail("dup2");
    if (control > 3)
        close(control);
    execvp(at[1], at + 1);
    return fail(at[1]);
}

/* Takes the effective uid and keeps the capabilities: some hosts let nobody else make a user namespace. */
static int become(uid_t owner)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct data[2];
    if (seteuid(owner) < 0 || syscall(SYS_capget, &head, data) < 0)
        return -1;
    for (int i = 0; i < 2; i++)
        data[i].effective = data[i].permitted;
    return (int)syscall(SYS_capset, &head, data);
}

static int userns(const char *owner)
{
    char byte;
    if (become((uid_t)strtoul(owner, NULL, 10)) < 0)
        return fail("owner");
    if (unshare(CLONE_NEWUSER) < 0)
        return fail("unshare");
    if (write(1, "\n", 1) != 1 || read(0, &byte, 1) != 1)
        return fail("parent");
    /* /proc/sys/user speaks of the user namespace of the process that opens it, user_namespaces(7) */
    if (write_text("/proc/sys/user/max_user_namespaces", "0") < 0)
        return fail("max_user_namespaces");
    if (write(1, "\n", 1) != 1 || read(0, &byte, 1) != 0)
        return fail("parent");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 5 && strcmp(argv[1], "run") == 0)
        return run(argv + 2);
    if (argc == 3 && strcmp(argv[1], "userns") == 0)
        return userns(argv[2]);
    fputs("sandboxd-launch: see launch.c\n", stderr);
    return 125;
}
