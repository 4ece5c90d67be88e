/* The features of this CPU and the choice of kernels, with its reason. */
#include "edgetune.h"

#include <stdio.h>
#include <string.h>

enum et_isa et_isa_in_use = ET_SCALAR;

static const char *const ISA_NAMES[ET_ISA_COUNT] = {"scalar", "avx2", "avx512", "neon"};

const char *et_isa_name(enum et_isa isa) { return ISA_NAMES[isa]; }

#ifdef __x86_64__

/* __builtin_cpu_supports takes literals only. It also checks that the operating system saves the registers. */
#define X86_FEATURES(X)                                                                                                \
    X("sse4.2")                                                                                                        \
    X("avx")                                                                                                           \
    X("avx2")                                                                                                          \
    X("fma")                                                                                                           \
    X("bmi2")                                                                                                          \
    X("avx512f")                                                                                                       \
    X("avx512bw")                                                                                                      \
    X("avx512dq")                                                                                                      \
    X("avx512vl")                                                                                                      \
    X("avx512vnni")                                                                                                    \
    X("avx512vbmi")                                                                                                    \
    X("avx512vbmi2")                                                                                                   \
    X("avx512bitalg")                                                                                                  \
    X("avx512vpopcntdq")                                                                                               \
    X("gfni")

static void list_features(char *out, size_t size) {
    __builtin_cpu_init();
    size_t used = 0;
    out[0] = '\0';
#define ADD(name)                                                                                                      \
    if (__builtin_cpu_supports(name) && used < size)                                                                   \
        used += (size_t)snprintf(out + used, size - used, "%s%s", used ? " " : "", name);
    X86_FEATURES(ADD)
#undef ADD
}

bool et_isa_runs_here(enum et_isa isa) {
    __builtin_cpu_init();
    if (isa == ET_AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return isa == ET_SCALAR || (isa == ET_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
}

static enum et_isa best_isa(const char **why) {
    if (et_isa_runs_here(ET_AVX512)) {
        *why = "this CPU has avx512f, bw, dq and vl";
        return ET_AVX512;
    }
    *why = et_isa_runs_here(ET_AVX2) ? "this CPU has avx2 and not all of avx512f, bw, dq, vl" : "this CPU has no avx2";
    return et_isa_runs_here(ET_AVX2) ? ET_AVX2 : ET_SCALAR;
}

#else

static void list_features(char *out, size_t size) {
#if defined(__aarch64__)
    snprintf(out, size, "neon");
#else
    snprintf(out, size, "%s", "");
#endif
}

bool et_isa_runs_here(enum et_isa isa) {
#if defined(__aarch64__)
    if (isa == ET_NEON)
        return true;
#endif
    return isa == ET_SCALAR;
}

static enum et_isa best_isa(const char **why) {
#if defined(__aarch64__)
    *why = "every AArch64 CPU has NEON";
    return ET_NEON;
#else
    *why = "there are no other kernels for this architecture";
    return ET_SCALAR;
#endif
}

#endif

static bool choose_wanted(const char *wanted, struct et_cpu *cpu) {
    for (int isa = 0; isa < ET_ISA_COUNT; isa++)
        if (strcmp(wanted, ISA_NAMES[isa]) == 0 && et_isa_runs_here((enum et_isa)isa)) {
            cpu->isa = (enum et_isa)isa;
            snprintf(cpu->reason, sizeof cpu->reason, "selected by EDGETUNE_ISA=%s", ISA_NAMES[isa]);
            return true;
        }
    size_t used =
        (size_t)snprintf(cpu->reason, sizeof cpu->reason, "EDGETUNE_ISA=%.32s cannot be used; this CPU runs", wanted);
    for (int isa = 0; isa < ET_ISA_COUNT; isa++)
        if (et_isa_runs_here((enum et_isa)isa) && used < sizeof cpu->reason)
            used += (size_t)snprintf(cpu->reason + used, sizeof cpu->reason - used, " %s", ISA_NAMES[isa]);
    return false;
}

bool et_cpu_choose(const char *wanted, struct et_cpu *cpu) {
    list_features(cpu->features, sizeof cpu->features);
    if (wanted && wanted[0]) {
        if (!choose_wanted(wanted, cpu))
            return false;
    } else {
        const char *why;
        cpu->isa = best_isa(&why);
        snprintf(cpu->reason, sizeof cpu->reason, "%s", why);
    }
    et_isa_in_use = cpu->isa;
    return true;
}
