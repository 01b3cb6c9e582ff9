/* stubborn bomb|spin N|sleep|daemon|stopped: what does not want to end. */
#include "attack.h"
#include <pthread.h>

static void *spin(void *unused)
{
    for (volatile unsigned long n = 0;; n++)
        ;
    return unused;
}

static void ignore_everything(void)
{
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    for (int number = 1; number < 65; number++)
        signal(number, SIG_IGN);
}

int main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    ignore_everything();
    if (strcmp(how, "bomb") == 0)
        for (;;)
            fork();
    if (strcmp(how, "spin") == 0) {
        pthread_t thread;
        for (int n = atoi(argv[2]); n > 1; n--)
            if (pthread_create(&thread, NULL, spin, NULL) != 0)
                return 3;
        spin(NULL);
    }
    if (strcmp(how, "sleep") == 0)
        for (;;)
            pause();
    if (strcmp(how, "daemon") == 0) { /* double fork, a session of its own, stdout stays open */
        for (int n = 0; n < 20; n++)
            if (fork() == 0) {
                setsid();
                if (fork() != 0)
                    _exit(0);
                for (;;) {
                    if (write(1, "still here\n", 11) < 0)
                        pause();
                    usleep(1000);
                }
            }
        usleep(50000);
        return 7;
    }
    if (strcmp(how, "stopped") == 0) {
        for (int n = 0; n < 10; n++)
            if (fork() == 0)
                for (;;)
                    kill(getpid(), SIGSTOP);
        kill(getpid(), SIGSTOP);
        for (;;)
            pause();
    }
    return 4;
}
