/* flood COUNT | numbers: denied calls in a loop, or of 1500 different numbers that no kernel has. */
#include "attack.h"

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "numbers") == 0) {
        for (long n = 0; n < 1500; n++)
            syscall(2000 + n);
        return 0;
    }
    long count = argc > 1 ? atol(argv[1]) : 0;
    for (int n = 0; n < 8; n++)
        if (fork() == 0)
            break;
    while (count--)
        syscall(SYS_ptrace, 0, 0, 0, 0);
    return 0;
}
