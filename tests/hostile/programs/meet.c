/* meet leave|look: put something into every place that is not a file, or look for it. */
#include "attack.h"
#include <mqueue.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/un.h>

#define KEY 0x5eed

int main(int argc, char **argv)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX, .sun_path = "\0meet"};
    socklen_t length = offsetof(struct sockaddr_un, sun_path) + 5;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (argc > 1 && strcmp(argv[1], "leave") == 0) {
        int done = shmget(KEY, 4096, IPC_CREAT | 0666) < 0 || shm_open("/meet", O_CREAT | O_RDWR, 0666) < 0 ||
                   mq_open("/meet", O_CREAT | O_RDWR, 0666, NULL) < 0 || bind(fd, (void *)&at, length) < 0 ||
                   listen(fd, 5) < 0;
        puts(done == 0 ? "left" : strerror(errno));
        fflush(stdout);
        pause();
    }
    TRY("shm", shmget(KEY, 4096, 0));
    TRY("posix shm", shm_open("/meet", O_RDWR, 0));
    TRY("mqueue", mq_open("/meet", O_RDWR));
    TRY("abstract", connect(fd, (void *)&at, length));
    return 0;
}
