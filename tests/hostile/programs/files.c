/* files many N | deep N | swap: file systems as their users did not mean them. */
#include "attack.h"
#include <sys/stat.h>

static void many(long wanted)
{
    long n = 0;
    char name[64];
    for (; n < wanted; n++) {
        snprintf(name, sizeof name, "%ld", n);
        int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600);
        if (fd < 0)
            break;
        close(fd);
    }
    printf("%ld %s\n", n, n < wanted ? strerrorname_np(errno) : "0");
}

static void deep(long wanted)
{
    long n = 0;
    for (; n < wanted; n++)
        if (mkdir("d", 0700) < 0 || chdir("d") < 0)
            break;
    close(open("bottom", O_WRONLY | O_CREAT, 0600));
    printf("%ld %s\n", n, n < wanted ? strerrorname_np(errno) : "0");
}

static void write_file(const char *name)
{
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK, 0600);
    if (fd >= 0 && write(fd, "inside\n", 7) < 0)
        exit(3);
    close(fd);
}

/* Children turn files into links, FIFOs, directories and back, as fast as they can, until they are killed. */
static void swap(void)
{
    mkdir("d", 0700);
    for (int n = 0; n < 4; n++)
        if (fork() == 0)
            for (;;) {
                write_file("a");
                write_file("d/a");
                unlink("a");
                if (symlink("/etc/passwd", "a") < 0) {
                }
                rename("a", "b");
                unlink("d/a");
                rmdir("d");
                if (symlink("/etc", "d") < 0) {
                }
                unlink("d");
                mkfifo("d", 0600);
                unlink("d");
                mkdir("d", 0700);
                if (link("b", "a") < 0) {
                }
            }
    usleep(50000);
}

int main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    if (strcmp(how, "many") == 0)
        many(atol(argv[2]));
    if (strcmp(how, "deep") == 0)
        deep(atol(argv[2]));
    if (strcmp(how, "swap") == 0)
        swap();
    return 0;
}
