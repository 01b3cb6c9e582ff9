/* watches hold|count: make inotify instances until the kernel refuses, say how many, and keep them. */
#include "attack.h"
#include <sys/inotify.h>

int main(int argc, char **argv)
{
    int n = 0;
    while (n < 900 && inotify_init() >= 0)
        n++;
    printf("%d\n", n);
    fflush(stdout);
    if (argc > 1 && strcmp(argv[1], "hold") == 0)
        pause();
    return 0;
}
