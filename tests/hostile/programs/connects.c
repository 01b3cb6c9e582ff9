/* connects ADDRESS:PORT|unix:PATH|abstract:NAME... : the errno of connecting to each. */
#include "attack.h"
#include <arpa/inet.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

static int to_unix(const char *name, int abstract)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    size_t length = strlen(name);
    memcpy(at.sun_path + abstract, name, length);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return connect(fd, (void *)&at, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1));
}

static int to_inet(char *text, int type)
{
    char *colon = strrchr(text, ':');
    char host[64] = {0};
    memcpy(host, text, (size_t)(colon - text));
    int port = atoi(colon + 1), fd, result;
    struct timeval patience = {.tv_sec = 2};
    if (strchr(host, ':')) {
        struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
        inet_pton(AF_INET6, host, &at.sin6_addr);
        fd = socket(AF_INET6, type, 0);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        result = connect(fd, (void *)&at, sizeof at);
    } else {
        struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
        inet_pton(AF_INET, host, &at.sin_addr);
        fd = socket(AF_INET, type, 0);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        result = connect(fd, (void *)&at, sizeof at);
    }
    if (result == 0 && type == SOCK_DGRAM) { /* only what was sent and answered would be a connection */
        char byte;
        struct timeval wait = {.tv_usec = 200000};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
        result = send(fd, "x", 1, 0) < 0 || recv(fd, &byte, 1, 0) < 0 ? -1 : 0;
    }
    return result;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "unix:", 5) == 0)
            TRY(argv[i], to_unix(argv[i] + 5, 0));
        else if (strncmp(argv[i], "abstract:", 9) == 0)
            TRY(argv[i], to_unix(argv[i] + 9, 1));
        else if (strncmp(argv[i], "udp:", 4) == 0)
            TRY(argv[i], to_inet(argv[i] + 4, SOCK_DGRAM));
        else
            TRY(argv[i], to_inet(argv[i], SOCK_STREAM));
    }
    return 0;
}
