/* hog KIND: take one kind of memory without end. What the process cannot map is kernel memory. */
#include "attack.h"
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/socket.h>

#define CHUNK ((size_t)1 << 20)

static void fill(char *at)
{
    if (at != MAP_FAILED && at != NULL)
        memset(at, 1, CHUNK);
}

static void anonymous(void)
{
    for (;;)
        fill(mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

static void shared(void)
{
    for (;;)
        fill(mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
}

static void memfd(void)
{
    char page[4096] = {1};
    int fd = memfd_create("hog", 0);
    for (;;)
        if (write(fd, page, sizeof page) < 0)
            exit(3);
}

static void system_v(void)
{
    for (;;) {
        int id = shmget(IPC_PRIVATE, CHUNK, IPC_CREAT | 0600);
        fill(id < 0 ? NULL : shmat(id, NULL, 0));
    }
}

/* Reading one page of every 2 MiB maps the zero page: nothing but page tables is used. */
static void page_tables(void)
{
    size_t step = (size_t)2 << 20, size = (size_t)1 << 38;
    char *at = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        exit(3);
    madvise(at, size, MADV_NOHUGEPAGE);
    volatile char sink;
    for (size_t offset = 0; offset < size; offset += step)
        sink = at[offset];
    (void)sink;
}

/* Buffers of pipes and sockets belong to no process; every child holds its own set. */
static void buffers(void)
{
    static char page[65536];
    for (;;) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) < 0) {
            if (fork() < 0)
                pause(); /* the limit of processes: keep what is held */
            continue;
        }
        int size = 1 << 22;
        setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        while (write(ends[0], page, sizeof page) > 0)
            ;
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*take)(void);
    } kinds[] = {{"anonymous", anonymous},     {"shared", shared}, {"memfd", memfd}, {"system_v", system_v},
                 {"page_tables", page_tables}, {"buffers", buffers}};
    /* As unlikely a victim as one can make oneself: PID 1 must not be taken instead. */
    int fd = open("/proc/self/oom_score_adj", O_WRONLY);
    if (write(fd, "0", 1) < 0)
        close(fd);
    for (size_t i = 0; argc > 1 && i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(argv[1], kinds[i].name) == 0)
            kinds[i].take();
    return 4;
}
