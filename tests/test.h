/* A small harness: CHECK counts and goes on, the last line tells, the exit status follows. */
#ifndef NBHD_TESTS_TEST_H
#define NBHD_TESTS_TEST_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long test_passed, test_failed, test_skipped;

/* CHECK(condition, "format", ...): the message says what was found. Evaluates to the condition. */
#define CHECK(condition, ...) test_check((condition), __FILE__, __LINE__, #condition, __VA_ARGS__)

__attribute__((format(printf, 5, 6))) static inline bool test_check(bool ok, const char *file, int line,
                                                                    const char *what, const char *format, ...)
{
    if (ok) {
        test_passed++;
        return true;
    }
    test_failed++;
    if (test_failed <= 40) {
        char text[1024];
        __builtin_va_list list;
        __builtin_va_start(list, format);
        vsnprintf(text, sizeof text, format, list);
        __builtin_va_end(list);
        fprintf(stderr, "%s:%d: FAILED %s: %s\n", file, line, what, text);
    }
    return false;
}

static inline void test_skip(const char *why)
{
    test_skipped++;
    printf("skipped: %s\n", why);
}

/* The larger tier, NBHD_FULL=1: some tests run more of the same. */
static inline bool test_full(void)
{
    const char *full = getenv("NBHD_FULL");
    return full && *full && strcmp(full, "0") != 0;
}

/* The smaller tier, NBHD_TEST_FEW=1: under an emulator, where all of it would take an hour. */
static inline bool test_few(void)
{
    const char *few = getenv("NBHD_TEST_FEW");
    return few && *few && strcmp(few, "0") != 0;
}

/* Random problems of a test: NBHD_TEST_RANDOM=n, else `full` in the larger tier, else `quick`. */
static inline unsigned test_random(unsigned quick, unsigned full)
{
    const char *wanted = getenv("NBHD_TEST_RANDOM");
    return wanted && *wanted ? (unsigned)atoi(wanted) : test_full() ? full : quick;
}

/* The first of them, NBHD_TEST_FIRST=n: a long run in pieces. */
static inline unsigned test_random_first(void)
{
    const char *first = getenv("NBHD_TEST_FIRST");
    return first ? (unsigned)atoi(first) : 0;
}

static inline int test_done(void)
{
    printf("%ld passed, %ld failed, %ld skipped\n", test_passed, test_failed, test_skipped);
    return test_failed ? 1 : 0;
}

#endif
