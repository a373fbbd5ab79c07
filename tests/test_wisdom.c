/* The tuner and its wisdom: what was measured is saved, loaded and used again; what cannot be used is left out with a
 * sentence; any number of threads at a time. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>
#include "case.h"
#include "nbhd.h"
#include "test.h"

static char path[64];

static nbhd_plan *plan_of(const char *line, unsigned flags)
{
    nbhd_desc desc;
    nbhd_plan *plan = NULL;
    CHECK(!nbhd_desc_parse(&desc, line), "%s: %s", line, nbhd_last_error());
    CHECK(!nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, flags), "%s: %s", line, nbhd_last_error());
    return plan;
}

static void write_file(const char *text)
{
    FILE *file = fopen(path, "w");
    if (CHECK(file != NULL, "cannot write %s", path)) {
        fputs(text, file);
        fclose(file);
    }
}

static void read_file(char *text, size_t room)
{
    FILE *file = fopen(path, "r");
    size_t n = file ? fread(text, 1, room - 1, file) : 0;
    text[n] = '\0';
    if (file)
        fclose(file);
}

static void check_round_trip(void)
{
    static const char *const lines[] = {"qk h2 d32 20x20 w7x7", "av_bwd bf16 d64 300 w20", "fwd d16 12x13 w5x5",
    "fwd f64 d8 40 w9"};
    for (int i = 0; i < 4; i++) {
        nbhd_wisdom_forget();
        nbhd_plan *measured = plan_of(lines[i], NBHD_PLAN_MEASURE), *again;
        if (!measured)
            return;
        CHECK(!nbhd_wisdom_save(path), "%s", nbhd_last_error());
        nbhd_wisdom_forget();
        int ignored = -1;
        CHECK(!nbhd_wisdom_load(path, &ignored) && ignored == 0, "%d ignored: %s", ignored, nbhd_last_error());
        again = plan_of(lines[i], 0);
        CHECK(!strcmp(nbhd_plan_kernel(again), nbhd_plan_kernel(measured)) &&
                  !strcmp(nbhd_plan_describe(again), nbhd_plan_describe(measured)),
              "%s: measured %s %s, loaded %s %s", lines[i], nbhd_plan_kernel(measured), nbhd_plan_describe(measured),
              nbhd_plan_kernel(again), nbhd_plan_describe(again));
        nbhd_plan_destroy(&measured);
        nbhd_plan_destroy(&again);
    }
}

/* The kernel that is planned with the wisdom of these lines, of this or of another machine. */
static void kernel_by(const char *lines, const nbhd_desc *desc, char kernel[64])
{
    nbhd_plan *plan = NULL;
    write_file(lines);
    nbhd_wisdom_forget();
    CHECK(!nbhd_wisdom_load(path, NULL), "%s", nbhd_last_error());
    CHECK(!nbhd_plan_create(&plan, desc, NBHD_DEVICE_CPU, 0), "%s", nbhd_last_error());
    snprintf(kernel, 64, "%s", nbhd_plan_kernel(plan));
    nbhd_plan_destroy(&plan);
}

/* A loaded choice decides, also against the table's order. */
static void check_obeyed(void)
{
    static const char choice[] = "1.5 cpu qk f32 h2 d32 20x20 w7x7 threads=2";
    char text[2048], line[4096], kernel[64], table[64], *machine;
    nbhd_wisdom_forget();
    nbhd_plan *plan = plan_of("qk h2 d32 20x20 w7x7", NBHD_PLAN_MEASURE);
    nbhd_plan_destroy(&plan);
    nbhd_wisdom_save(path);
    read_file(text, sizeof text);
    machine = strstr(text, "\nmachine ");
    if (!CHECK(machine != NULL, "no machine in '%s'", text))
        return;
    *strchr(machine + 1, '\n') = '\0';
    nbhd_desc desc;
    nbhd_desc_parse(&desc, "qk h2 d32 20x20 w7x7");
    desc.threads = 2;
    kernel_by("nbhd wisdom 1\n", &desc, table);
    snprintf(line, sizeof line, "%s\ncpu.qk_scalar 0,0x0x0,0x0x0,0,2 %s\n", text, choice);
    kernel_by(line, &desc, kernel);
    CHECK(!strcmp(kernel, "cpu.qk_scalar") && strcmp(kernel, table), "wisdom says cpu.qk_scalar, the plan %s", kernel);
    desc.threads = 3; /* another problem */
    kernel_by(line, &desc, kernel);
    CHECK(!strcmp(kernel, table), "the choice for 2 threads gave 3 threads %s, the table %s", kernel, table);
    desc.threads = 2;
    snprintf(line, sizeof line, "nbhd wisdom 1\nmachine of another kind\ncpu.qk_scalar 0,0x0x0,0x0x0,0,2 %s\n", choice);
    kernel_by(line, &desc, kernel);
    CHECK(!strcmp(kernel, table), "another machine's choice gave %s, the table %s", kernel, table);
    /* a kernel or configuration that there is not: the table decides */
    static const char *const stale[] = {"cpu.qk_nothing 0,0x0x0,0x0x0,0,2", "cpu.qk_scalar 7,0x0x0,0x0x0,0,2",
                                        "cpu.fwd_scalar 0,0x0x0,0x0x0,0,2"};
    for (int i = 0; i < 3; i++) {
        snprintf(line, sizeof line, "%s\n%s %s\n", text, stale[i], choice);
        kernel_by(line, &desc, kernel);
        CHECK(!strcmp(kernel, table), "'%s' gave %s, the table %s", stale[i], kernel, table);
    }
}

/* Where one row is tens of times as fast as another, no noise hides it. */
static void check_fastest(void)
{
    static const char line[] = "fwd d32 32x32 w7x7";
    char why[NBHD_TEXT];
    nbhd_desc desc;
    int rows = 0;
    nbhd_desc_parse(&desc, line);
    for (int i = 0; nbhd_kernel_name(i); i++)
        rows += !nbhd_kernel_refusal(i, &desc, NBHD_DEVICE_CPU, why, sizeof why) && !*why;
    if (rows < 2) {
        test_skip("no row but the scalar one runs here");
        return;
    }
    nbhd_wisdom_forget();
    nbhd_plan *plan = plan_of(line, NBHD_PLAN_MEASURE);
    CHECK(strcmp(nbhd_plan_kernel(plan), "cpu.fwd_scalar") != 0,
          "of %d rows the scalar one was measured as the fastest", rows);
    nbhd_plan_destroy(&plan);
}

/* A device or a FIFO stays what it is, and a link a link. */
static void check_other_files(void)
{
    char other[300];
    struct stat s;
    snprintf(other, sizeof other, "%s.other", path);
    CHECK(!mkfifo(other, 0666), "%s", other);
    CHECK(nbhd_wisdom_save(other) == NBHD_ERROR_IO && strstr(nbhd_last_error(), "no regular file"), "saved to a FIFO");
    CHECK(!lstat(other, &s) && S_ISFIFO(s.st_mode), "the FIFO is gone");
    unlink(other);
    write_file("old");
    CHECK(!symlink(path, other), "%s", other);
    CHECK(!nbhd_wisdom_save(other) && !nbhd_wisdom_load(path, NULL), "%s", nbhd_last_error());
    CHECK(!lstat(other, &s) && S_ISLNK(s.st_mode), "the link is gone");
    unlink(other);
    unlink(path);
}

/* Where the file cannot take its name, the temporary one goes. */
static void check_failed_save(void)
{
    char folder[300], temporary[340];
    snprintf(folder, sizeof folder, "%s.folder", path);
    snprintf(temporary, sizeof temporary, "%s.%ld", folder, (long)getpid());
    CHECK(!mkdir(folder, 0777), "%s", folder);
    CHECK(nbhd_wisdom_save(folder) == NBHD_ERROR_IO, "saved to a folder");
    CHECK(access(temporary, F_OK) != 0, "%s is left", temporary);
    CHECK(nbhd_wisdom_load(folder, NULL) == NBHD_ERROR_IO, "a folder was loaded: %s", nbhd_last_error());
    rmdir(folder);
}

static void check_bad_files(void)
{
    char text[4096];
    int ignored;
    nbhd_wisdom_forget();
    CHECK(nbhd_wisdom_load("wisdom-no-such-directory/x", NULL) == NBHD_ERROR_IO, "a file that is not there was loaded");
    CHECK(nbhd_wisdom_load(NULL, NULL) == NBHD_ERROR_INVALID, "NULL was loaded");
    CHECK(nbhd_wisdom_load("", NULL) == NBHD_ERROR_INVALID && nbhd_wisdom_save("") == NBHD_ERROR_INVALID &&
              strstr(nbhd_last_error(), "path is empty"),
          "a file without a name: %s", nbhd_last_error());
    CHECK(nbhd_wisdom_save("wisdom-no-such-directory/x") == NBHD_ERROR_IO, "saved to no directory");
    CHECK(nbhd_wisdom_save(NULL) == NBHD_ERROR_INVALID, "saved to NULL");
    check_failed_save();
    check_other_files();
    static const char *const headers[] = {"", "nbhd wisdom 2\n", "nbhd wisdom 10\n", "something else\n"};
    for (int i = 0; i < 4; i++) {
        write_file(headers[i]);
        CHECK(nbhd_wisdom_load(path, NULL) == NBHD_ERROR_INVALID, "header '%s' was read", headers[i]);
    }
    write_file("nbhd wisdom 1\n"
               "cpu.fwd_scalar 0,0x0x0,0x0x0,0,1 1 cpu fwd f32 d8 20 w5 threads=0\n" /* no machine yet */
               "machine of another kind\n# a comment\n\n"
               "cpu.fwd_scalar 0,0x0x0,0x0x0,0,1 1 cpu fwd f32 d8 20 w5 threads=0\n"
               "cpu.fwd_scalar 0,0x0x0,0x0x0,0,1 fast cpu fwd f32 d8 20 w5 threads=0\n"
               "cpu.fwd_scalar 0,0x0x0,0x0x0,0,1 -1 cpu fwd f32 d8 20 w5 threads=0\n"
               "cpu.fwd_scalar\n"
               "cpu.fwd_scalar 0,0x0x0,0x0x0,0,1 1 abacus fwd f32 d8 20 w5 threads=0\n");
    CHECK(!nbhd_wisdom_load(path, &ignored) && ignored == 5, "%d of 5 bad lines were ignored", ignored);
    CHECK(strstr(nbhd_last_error(), ":2 is no line of wisdom") != NULL, "%s", nbhd_last_error());
    CHECK(!nbhd_wisdom_save(path), "%s", nbhd_last_error());
    read_file(text, sizeof text);
    CHECK(!strcmp(text, "nbhd wisdom 1\nmachine of another kind\n"
                        "cpu.fwd_scalar 0,0x0x0,0x0x0,0,1 1 cpu fwd f32 d8 20 w5 threads=0\n"), "saved '%s'", text);
}

/* Of two choices for one problem of one machine the later stands. */
static void check_replaced(void)
{
    static const char later[] = "nbhd wisdom 1\nmachine of another kind\n"
                                "cpu.fwd_scalar 0,0x0x0,0x0x0,0,2 0.5 cpu fwd f32 d8 20 w5 threads=0\n";
    char text[4096];
    nbhd_wisdom_forget();
    write_file("nbhd wisdom 1\nmachine of another kind\n"
               "cpu.fwd_scalar 0,0x0x0,0x0x0,0,1 1 cpu fwd f32 d8 20 w5 threads=0\n");
    CHECK(!nbhd_wisdom_load(path, NULL), "%s", nbhd_last_error());
    write_file(later);
    CHECK(!nbhd_wisdom_load(path, NULL) && !nbhd_wisdom_save(path), "%s", nbhd_last_error());
    read_file(text, sizeof text);
    CHECK(!strcmp(text, later), "saved '%s'", text);
}

/* A plan that was measured computes what it should, with wisdom and without. */
static void check_results(void)
{
    static const char *const lines[] = {"qk b2 h2 d20 9x14 w3x5 ect", "qk_bwd h4/2 d32 9x14 w5x5 bias",
    "fwd d24 16x17 w7x7"};
    nbhd_wisdom_forget();
    for (int i = 0; i < 6; i++) {
        nbhd_desc desc;
        struct case_result result;
        const struct case_options options = {.flags = NBHD_PLAN_MEASURE, .seed = (unsigned)i, .threads = 2};
        nbhd_desc_parse(&desc, lines[i % 3]);
        const nbhd_status status = case_run(&desc, &options, &result);
        CHECK(!status && result.ok, "%s by %s: %s", lines[i % 3], result.kernel, result.why);
    }
}

struct planner {
    const char *line;
    int failures;
};

static void *plan_often(void *context)
{
    struct planner *p = context;
    for (int i = 0; i < 3; i++) {
        nbhd_desc desc;
        nbhd_plan *plan = NULL;
        nbhd_desc_parse(&desc, i & 1 ? "av d16 40 w5" : p->line);
        p->failures += nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, NBHD_PLAN_MEASURE) != NBHD_OK;
        nbhd_plan_destroy(&plan);
        p->failures += nbhd_wisdom_save(path) || nbhd_wisdom_load(path, NULL);
    }
    return NULL;
}

static void check_threads(void)
{
    struct planner planners[] = {{"qk d16 40 w5", 0}, {"av d16 41 w5", 0}, {"qk d16 40 w5", 0}};
    pthread_t threads[3];
    nbhd_wisdom_forget();
    for (int i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, plan_often, &planners[i]);
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        CHECK(!planners[i].failures, "planner %d: %d failures", i, planners[i].failures);
    }
}

int main(void)
{
    snprintf(path, sizeof path, "wisdom-%ld.txt", (long)getpid());
    check_bad_files();
    check_round_trip();
    check_obeyed();
    check_replaced();
    check_fastest();
    check_results();
    check_threads();
    nbhd_wisdom_forget();
    remove(path);
    return test_done();
}
