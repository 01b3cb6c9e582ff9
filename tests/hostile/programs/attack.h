/* What the probing programs share: one line "NAME RESULT" per attempt, RESULT an errno's name or 0. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static inline const char *result_name(long result)
{
    return result >= 0 ? "0" : strerrorname_np(errno);
}

/* The result of an expression that returns a negative number and sets errno when it fails. */
#define TRY(name, expression)                                                                      \
    do {                                                                                           \
        errno = 0;                                                                                 \
        long result_ = (long)(expression);                                                         \
        printf("%s %s\n", name, result_name(result_));                                             \
        fflush(stdout);                                                                            \
    } while (0)
#define CALL(name, ...) TRY(name, syscall(__VA_ARGS__))
