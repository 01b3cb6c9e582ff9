/* A filter of the tool's own that allows everything: it may be installed, and widens nothing. */
#include "attack.h"
#include <linux/filter.h>
#include <linux/seccomp.h>

int main(void)
{
    struct sock_filter code[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {1, code};
    CALL("listener", SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    CALL("allow all", SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
    CALL("mount", SYS_mount, "tmpfs", "/tmp", "tmpfs", 0, 0);
    CALL("unshare", SYS_unshare, 0x10000000);
    return 0;
}
