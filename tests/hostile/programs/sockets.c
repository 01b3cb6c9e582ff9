/* Sockets of every family that speaks to something beyond the container. */
#include "attack.h"
#include <sys/socket.h>

int main(void)
{
    static const struct {
        const char *name;
        long family, type, protocol;
    } kinds[] = {
        {"packet", 17, SOCK_RAW, 0x300},
        {"vsock", 40, SOCK_STREAM, 0},
        {"vsock high bits", 1L << 32 | 40, SOCK_STREAM, 0},
        {"alg", 38, SOCK_SEQPACKET, 0},
        {"netlink netfilter", 16, SOCK_RAW, 12},
        {"netlink audit", 16, SOCK_RAW, 9},
        {"netlink generic", 16, SOCK_RAW, 16},
        {"netlink uevent", 16, SOCK_RAW, 15},
        {"netlink crypto", 16, SOCK_RAW, 21},
        {"inet raw", 2, SOCK_RAW, 1},
        {"inet6 raw", 10, SOCK_RAW, 58},
        {"icmp", 2, SOCK_DGRAM, 1},
        {"sctp", 2, SOCK_STREAM, 132},
        {"dccp", 2, 6, 33},
        {"mptcp", 2, SOCK_STREAM, 262},
        {"udplite", 2, SOCK_DGRAM, 136},
        {"key", 15, SOCK_RAW, 2},
        {"bluetooth", 31, SOCK_RAW, 1},
        {"can", 29, SOCK_RAW, 1},
        {"tipc", 30, SOCK_STREAM, 0},
        {"rds", 21, SOCK_SEQPACKET, 0},
        {"smc", 43, SOCK_STREAM, 0},
        {"xdp", 44, SOCK_RAW, 0},
        {"qipcrtr", 42, SOCK_DGRAM, 0},
        {"unspecified", 0, SOCK_STREAM, 0},
        {"unix", 1, SOCK_STREAM, 0},
        {"tcp", 2, SOCK_STREAM, 0},
        {"udp", 2, SOCK_DGRAM, 0},
        {"tcp6", 10, SOCK_STREAM, 0},
        {"netlink route", 16, SOCK_RAW, 0},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        CALL(kinds[i].name, SYS_socket, kinds[i].family, kinds[i].type, kinds[i].protocol);
    int pair[2];
    CALL("socketpair inet", SYS_socketpair, 2, SOCK_STREAM, 0, pair);
    CALL("socketpair tipc", SYS_socketpair, 30, SOCK_STREAM, 0, pair);
    return 0;
}
