/* loopback tcp|udp: fill the buffers of sockets on the container's own loopback until nothing is taken. */
#include "attack.h"
#include <arpa/inet.h>
#include <sys/socket.h>

static char page[60000];
static const int big = 1 << 26;
static struct sockaddr_in self = {.sin_family = AF_INET};

static int bound(int type)
{
    socklen_t length = sizeof self;
    int fd = socket(AF_INET, type, 0);
    self.sin_port = 0;
    if (fd < 0 || bind(fd, (void *)&self, sizeof self) < 0 || getsockname(fd, (void *)&self, &length) < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &big, sizeof big);
    return fd;
}

static long fill(int fd)
{
    long total = 0;
    for (int idle = 0; idle < 3;) {
        ssize_t n = sendto(fd, page, sizeof page, MSG_DONTWAIT | MSG_NOSIGNAL, (void *)&self, sizeof self);
        if (n > 0)
            total += n;
        else
            idle++, usleep(500);
        if (total > 64l << 20)
            break;
    }
    return total;
}

int main(int argc, char **argv)
{
    int udp = argc > 1 && strcmp(argv[1], "udp") == 0;
    long total = 0;
    self.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int server = bound(udp ? SOCK_DGRAM : SOCK_STREAM);
    if (!udp)
        listen(server, 4096);
    for (int n = 0; n < 100; n++) {
        int fd = socket(AF_INET, (udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK, 0);
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &big, sizeof big);
        if (udp) {
            close(server);
            server = bound(SOCK_DGRAM);
            dup(server); /* what was sent stays */
        } else {
            connect(fd, (void *)&self, sizeof self);
            usleep(1000);
            accept4(server, NULL, NULL, SOCK_NONBLOCK);
        }
        total += fill(fd);
    }
    printf("%ld\n", total);
    fflush(stdout);
    pause();
    return 0;
}
