/* sweep FIRST LAST ARG [native|int80]: make every system call from FIRST to LAST and say what came back.
 *
 * Each call is made by a process of its own with all six arguments ARG, and is killed if it blocks.
 * Prints "NUMBER RESULT" lines: 0 or an errno, or "gone" if the call did not return. It needs only
 * what every base allows, and runs alike on a host and in a container.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GONE 100000L
#define PATIENCE_MS 200

/* Inlined, never a function: after vfork, parent and child come back to one stack frame. */
#if defined(__x86_64__)
#define CALL(result, number, arg)                                                                  \
    do {                                                                                           \
        register long r10 __asm__("r10") = (arg), r8 __asm__("r8") = (arg), r9 __asm__("r9") = (arg); \
        __asm__ volatile("syscall" : "=a"(result)                                                  \
                         : "a"(number), "D"(arg), "S"(arg), "d"(arg), "r"(r10), "r"(r8), "r"(r9)   \
                         : "rcx", "r11", "memory");                                                \
    } while (0)
#define CALL_INT80(result, number, arg)                                                            \
    __asm__ volatile("int $0x80" : "=a"(result)                                                    \
                     : "a"(number), "b"(arg), "c"(arg), "d"(arg), "S"(arg), "D"(arg)               \
                     : "r8", "r9", "r10", "r11", "memory")
#elif defined(__aarch64__)
#define CALL(result, number, arg)                                                                  \
    do {                                                                                           \
        register long x8 __asm__("x8") = (number), x0 __asm__("x0") = (arg);                       \
        register long x1 __asm__("x1") = (arg), x2 __asm__("x2") = (arg), x3 __asm__("x3") = (arg); \
        register long x4 __asm__("x4") = (arg), x5 __asm__("x5") = (arg);                          \
        __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory"); \
        result = x0;                                                                               \
    } while (0)
#endif

int main(int argc, char **argv) {
    if (argc < 4)
        return 125;
    long first = strtol(argv[1], NULL, 0), last = strtol(argv[2], NULL, 0);
    long arg = (long)strtoull(argv[3], NULL, 0);
    int foreign = argc > 4 && strcmp(argv[4], "int80") == 0;
    volatile long *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return 125;
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    for (long number = first; number <= last; number++) {
        shared[0] = GONE;
        fflush(stdout);
        pid_t child = fork();
        if (child < 0)
            return 125;
        if (child == 0) {
            long self, after, result = 0;
            setsid(); /* so that a signal to the group stays here */
            CALL(self, SYS_getpid, 0L);
#ifdef __x86_64__
            if (foreign)
                CALL_INT80(result, number, arg);
            else
#endif
                CALL(result, number, arg);
            CALL(after, SYS_getpid, 0L);
            if (after == self) /* not the child that the call made */
                shared[0] = result < 0 && result > -4096 ? -result : 0;
            CALL(after, SYS_exit_group, 0L);
        }
        int waited = 0, status;
        for (int ms = 0; ms < PATIENCE_MS && (waited = waitpid(child, &status, WNOHANG)) == 0; ms++) {
            struct timespec pause = {0, ms == 0 ? 100000 : 1000000};
            nanosleep(&pause, NULL);
        }
        if (waited == 0) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
        }
        if (shared[0] == GONE)
            printf("%ld gone\n", number);
        else
            printf("%ld %ld\n", number, shared[0]);
    }
    (void)foreign;
    return 0;
}
