/* Detection of instruction sets: what the CPU has and the operating system saves. */
#define _DEFAULT_SOURCE /* syscall */
#include <stdatomic.h>
#include <string.h>
#include "core/kernel.h"
#include "cpu/isa.h"
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__has_include)
#if __has_include(<sys/platform/x86.h>)
#include <sys/platform/x86.h>
#define HAVE_LIBRARY_CPUID /* glibc from 2.33 on */
#endif
#endif
#endif
#include <unistd.h>
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#endif

static bool bit(uint32_t word, int at) { return word >> at & 1; }

unsigned nbhd_isa_from_cpuid(const struct nbhd_cpuid *w)
{
    unsigned isa = NBHD_ISA_SCALAR;
    const bool ymm = bit(w->leaf1_ecx, 27) && (w->xcr0 & 0x6) == 0x6;
    const bool zmm = ymm && (w->xcr0 & 0xe0) == 0xe0;
    const bool tiles = zmm && (w->xcr0 & 0x60000) == 0x60000;
    const bool fma = bit(w->leaf1_ecx, 12), f16c = bit(w->leaf1_ecx, 29), avx2 = bit(w->leaf7_ebx, 5);
    if (!(ymm && fma && f16c && avx2))
        return isa;
    isa |= NBHD_ISA_AVX2;
    const bool f = bit(w->leaf7_ebx, 16), dq = bit(w->leaf7_ebx, 17), bw = bit(w->leaf7_ebx, 30);
    const bool vl = bit(w->leaf7_ebx, 31);
    if (!(zmm && f && dq && bw && vl))
        return isa;
    isa |= NBHD_ISA_AVX512;
    if (!bit(w->leaf7_1_eax, 5))
        return isa;
    isa |= NBHD_ISA_AVX512BF16;
    if (tiles && bit(w->leaf7_edx, 24) && bit(w->leaf7_edx, 22))
        isa |= NBHD_ISA_AMX;
    return isa;
}

#if defined(__x86_64__)
static uint64_t read_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Linux gives the tile registers only to a process that asks. */
static bool tiles_permitted(void)
{
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
#else
    return false;
#endif
}

/* In a virtual machine each cpuid instruction traps, which takes microseconds: the C library keeps the answers. */
#if defined(HAVE_LIBRARY_CPUID)
static struct nbhd_cpuid read_cpuid(void)
{
    enum { EAX, EBX, ECX, EDX };
    const unsigned *leaf1 = __x86_get_cpuid_feature_leaf(CPUID_INDEX_1)->cpuid_array;
    const unsigned *leaf7 = __x86_get_cpuid_feature_leaf(CPUID_INDEX_7)->cpuid_array;
    const unsigned *leaf7_1 = __x86_get_cpuid_feature_leaf(CPUID_INDEX_7_ECX_1)->cpuid_array;
    return (struct nbhd_cpuid){.leaf1_ecx = leaf1[ECX], .leaf7_ebx = leaf7[EBX], .leaf7_edx = leaf7[EDX],
                               .leaf7_1_eax = leaf7_1[EAX]};
}
#else
static struct nbhd_cpuid read_cpuid(void)
{
    struct nbhd_cpuid words = {0};
    uint32_t a, b, c, d;
    __cpuid(1, a, b, c, d);
    words.leaf1_ecx = c;
    if (bit(c, 27)) { /* xgetbv, and with it leaf 13, so leaf 7 too */
        uint32_t subleaves;
        __cpuid_count(7, 0, subleaves, b, c, d);
        words.leaf7_ebx = b;
        words.leaf7_edx = d;
        if (subleaves && bit(b, 16)) {
            __cpuid_count(7, 1, a, b, c, d);
            words.leaf7_1_eax = a;
        }
    }
    return words;
}
#endif

static unsigned detect(void)
{
    struct nbhd_cpuid words = read_cpuid();
    if (bit(words.leaf1_ecx, 27)) /* xgetbv */
        words.xcr0 = read_xcr0();
    unsigned isa = nbhd_isa_from_cpuid(&words);
    if (isa & NBHD_ISA_AMX && !tiles_permitted())
        isa &= ~(unsigned)NBHD_ISA_AMX;
    return isa;
}
#elif defined(__aarch64__)
static unsigned detect(void) { return NBHD_ISA_SCALAR | NBHD_ISA_NEON; }
#else
static unsigned detect(void) { return NBHD_ISA_SCALAR; }
#endif

static const struct {
    unsigned bit, closed; /* closed: the bit and all that it contains */
    const char *name;
} sets[] = {
    {NBHD_ISA_SCALAR, 1, "scalar"}, {NBHD_ISA_AVX2, 3, "avx2"}, {NBHD_ISA_AVX512, 7, "avx512"},
    {NBHD_ISA_AVX512BF16, 15, "avx512bf16"}, {NBHD_ISA_AMX, 31, "amx"}, {NBHD_ISA_NEON, 33, "neon"},
};
enum { SETS = sizeof sets / sizeof *sets };

const char *nbhd_isa_name(unsigned wanted)
{
    for (int i = 0; i < SETS; i++)
        if (sets[i].bit == wanted)
            return sets[i].name;
    return "unknown";
}

/* An unknown name in NBHD_ISA caps nothing, but is said. */
static unsigned environment_cap(void)
{
    const char *name = nbhd_env("NBHD_ISA");
    for (int i = 0; name && i < SETS; i++)
        if (!strcmp(sets[i].name, name))
            return sets[i].closed;
    if (name)
        nbhd_log(0, "NBHD_ISA is '%s'; known are scalar, avx2, avx512, avx512bf16, amx, neon. It is ignored", name);
    return ~0u;
}

static atomic_uint detected; /* 0: not yet; detection is idempotent, so a race only repeats it */
static atomic_uint limit = ~0u;

unsigned nbhd_isa_available(void)
{
    unsigned isa = atomic_load_explicit(&detected, memory_order_relaxed);
    if (!isa) {
        isa = detect() & environment_cap();
        atomic_store_explicit(&detected, isa, memory_order_relaxed);
    }
    return isa & atomic_load_explicit(&limit, memory_order_relaxed);
}

void nbhd_isa_limit(unsigned mask) { atomic_store(&limit, mask); }

void nbhd_isa_assume(unsigned bits) { atomic_store(&detected, (detect() & environment_cap()) | bits); }

bool nbhd_isa_refuses(unsigned needs, char why[NBHD_TEXT])
{
    if (nbhd_isa_available() & needs)
        return false;
    return nbhd_refuse(why, "this machine has no %s, or NBHD_ISA leaves it out", nbhd_isa_name(needs));
}

/* The C library's name of a cache's size; some have none. */
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
enum { L1_SIZE = _SC_LEVEL1_DCACHE_SIZE, L2_SIZE = _SC_LEVEL2_CACHE_SIZE };
#else
enum { L1_SIZE = -1, L2_SIZE = -1 };
#endif

static size_t cache_bytes(int name, size_t otherwise)
{
    const long bytes = name < 0 ? 0 : sysconf(name);
    return bytes > 0 ? (size_t)bytes : otherwise;
}

size_t nbhd_l1_bytes(void) { return cache_bytes(L1_SIZE, 32 << 10); }
size_t nbhd_l2_bytes(void) { return cache_bytes(L2_SIZE, 1 << 20); }
