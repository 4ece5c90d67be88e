/* Finds out whether AMX works. Some virtual machines advertise it and then fault on the first tile instruction, and a
 * process cannot recover from such a fault. So a child process tries; if it dies, AMX does not work.
 *
 * The child is forked from a process that may have threads: until _exit it only makes system calls. */
#include "edgetune.h"

#include <stdio.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    ARCH_REQ_XCOMP_PERM_CODE = 0x1023, /* arch_prctl: ask the kernel for the tile registers */
    XFEATURE_TILE_DATA = 18,
    TIMEOUT_SECONDS = 5,
};

/* Exit codes of the child. */
enum child_exit { TILES_WORK = 0, NO_PERMISSION = 10, WRONG_RESULT = 11 };

/* The operand of ldtilecfg: palette 1; three tiles of one row and four bytes. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t column_bytes[16];
    uint8_t rows[16];
};

static bool advertised(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return false;
    bool cpu = (d >> 24 & 1) && (d >> 25 & 1); /* amx-tile and amx-int8 */
    if (!cpu || !__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
        return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3; /* the system saves tile configuration and tile data */
}

/* (1, 2, 3, 4) . (5, 6, 7, 8) = 70 on 1 x 1 tiles, with the instructions that ggml's AMX path uses. */
static int32_t tile_product(void) {
    const struct tile_config config = {.palette = 1, .column_bytes = {4, 4, 4}, .rows = {1, 1, 1}};
    const int8_t left[4] = {1, 2, 3, 4}, right[4] = {5, 6, 7, 8};
    int32_t result = 0;
    const long stride = 4;
    __asm__ volatile(
        "ldtilecfg (%[config])\n\t"
        "tilezero %%tmm0\n\t"
        "tileloadd (%[left], %[stride], 1), %%tmm1\n\t"
        "tileloadd (%[right], %[stride], 1), %%tmm2\n\t"
        "tdpbssd %%tmm2, %%tmm1, %%tmm0\n\t"
        "tilestored %%tmm0, (%[result], %[stride], 1)\n\t"
        "tilerelease"
        :
        : [config] "r"(&config), [left] "r"(left), [right] "r"(right), [result] "r"(&result), [stride] "r"(stride)
        : "memory");
    return result;
}

/* A fault must end the child silently: no signal handler of the parent (faulthandler), no core file, no endless
 * wait. */
static void prepare_for_a_fault(void) {
    const int faults[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP, SIGALRM, SIGABRT};
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++)
        signal(faults[i], SIG_DFL);
    const struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    alarm(TIMEOUT_SECONDS);
}

static void child(void) {
    prepare_for_a_fault();
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM_CODE, XFEATURE_TILE_DATA) != 0)
        _exit(NO_PERMISSION);
    _exit(tile_product() == 70 ? TILES_WORK : WRONG_RESULT);
}

static void explain_exit(int code, struct et_amx *amx) {
    amx->usable = code == TILES_WORK;
    if (code == TILES_WORK)
        snprintf(amx->reason, sizeof amx->reason, "a tile product ran in a child process");
    else if (code == NO_PERMISSION)
        snprintf(amx->reason, sizeof amx->reason,
                 "the kernel does not grant access to the tile registers (arch_prctl)");
    else
        snprintf(amx->reason, sizeof amx->reason, "a tile product in a child process had a wrong result");
}

static void try_in_child(struct et_amx *amx) {
    pid_t pid = fork();
    if (pid == 0)
        child();
    if (pid < 0) {
        snprintf(amx->reason, sizeof amx->reason, "could not start a child process to try it: %s", strerror(errno));
        return;
    }
    int status;
    pid_t waited;
    do
        waited = waitpid(pid, &status, 0);
    while (waited < 0 && errno == EINTR);
    if (waited != pid)
        snprintf(amx->reason, sizeof amx->reason, "could not wait for the child process that tried it: %s",
                 strerror(errno));
    else if (WIFSIGNALED(status))
        snprintf(amx->reason, sizeof amx->reason, "a tile instruction killed a child process: %s",
                 strsignal(WTERMSIG(status)));
    else
        explain_exit(WEXITSTATUS(status), amx);
}

void et_amx_probe(bool force, struct et_amx *amx) {
    *amx = (struct et_amx){.advertised = advertised()};
    if (amx->advertised || force)
        try_in_child(amx);
    else
        snprintf(amx->reason, sizeof amx->reason, "this CPU does not advertise AMX");
}

#else

void et_amx_probe(bool force, struct et_amx *amx) {
    (void)force;
    *amx = (struct et_amx){0};
    snprintf(amx->reason, sizeof amx->reason, "not applicable: AMX exists on x86-64 and is probed on Linux");
}

#endif
