/* filtered FILTER SOCKET UID ARGV...: run a program under a system call filter, as the parked tool does.
 *
 * Reads struct sock_filter[] from the file FILTER, becomes UID, sets no_new_privs, installs the filter
 * with a listener, sends the listener over the descriptor SOCKET together with the nanoseconds that
 * installing took, waits for one byte, and executes ARGV.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WAIT_KILLABLE_RECV (1UL << 5) /* Linux 5.19 */

static void die(const char *what) {
    fprintf(stderr, "filtered: %s: %s\n", what, strerror(errno));
    exit(125);
}

static uint64_t now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

int main(int argc, char **argv) {
    static struct sock_filter code[4096];
    if (argc < 5)
        return 125;
    int file = open(argv[1], O_RDONLY | O_CLOEXEC), sock = atoi(argv[2]), uid = atoi(argv[3]);
    ssize_t size = file < 0 ? -1 : read(file, code, sizeof code);
    if (size < 0)
        die(argv[1]);
    if (geteuid() == 0 && unshare(CLONE_NEWIPC) < 0) /* what a program leaves there goes with it */
        die("unshare");
    if (uid && (setresgid(uid, uid, uid) < 0 || setresuid(uid, uid, uid) < 0))
        die("setresuid");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        die("no_new_privs");
    struct sock_fprog program = {(unsigned short)(size / sizeof code[0]), code};
    unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE_RECV;
    uint64_t start = now();
    int listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    if (listener < 0 && errno == EINVAL)
        listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags & ~WAIT_KILLABLE_RECV, &program);
    uint64_t took = now() - start;
    if (listener < 0)
        die("seccomp");
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec data = {&took, sizeof took};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &listener, sizeof listener);
    char go;
    if (sendmsg(sock, &message, 0) < 0 || read(sock, &go, 1) != 1)
        die("hand over");
    close(listener);
    close(sock);
    execvp(argv[4], argv + 4);
    die(argv[4]);
}
