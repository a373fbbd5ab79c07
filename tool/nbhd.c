/* The command `nbhd`: finds the command in the table below and runs it. */
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* A new command is cmd_NAME.c and one row here. */
#define COMMANDS(ROW) \
    ROW(cmd_run) \
    ROW(cmd_denoise) \
    ROW(cmd_plan) \
    ROW(cmd_check) \
    ROW(cmd_bench) \
    ROW(cmd_mask) \
    ROW(cmd_sim) \
    ROW(cmd_list) \
    ROW(cmd_jit) \
    ROW(cmd_info)

#define DECLARE(row) extern const struct command row;
#define ENTRY(row)   &row,
COMMANDS(DECLARE)
static const struct command *const commands[] = {COMMANDS(ENTRY)};
enum { COMMAND_COUNT = sizeof commands / sizeof *commands };

static const char *running; /* the command's name, for sentences */

static void say(const char *format, va_list list)
{
    fflush(stdout);
    fprintf(stderr, running ? "nbhd %s: " : "nbhd: ", running);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
}

int tool_fail(int status, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    say(format, list);
    va_end(list);
    return status;
}

void tool_note(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    say(format, list);
    va_end(list);
}

int tool_fail_library(nbhd_status status)
{
    const char *sentence = nbhd_last_error();
    return tool_fail(status == NBHD_ERROR_INVALID ? TOOL_USAGE : TOOL_FAILED, "%s",
                     *sentence ? sentence : nbhd_status_name(status));
}

/* Flushes stdout: a full disk or a closed pipe is a failure like any other. */
static int finish(int status)
{
    if (!fflush(stdout) && !ferror(stdout))
        return status;
    return tool_fail(TOOL_FAILED, "stdout: cannot write: %s", strerror(errno));
}

static int help(void)
{
    puts("nbhd: neighborhood attention on tensors, photographs and problem lines.\n\n"
         "usage: nbhd COMMAND [OPTIONS] ...\n");
    for (int i = 0; i < COMMAND_COUNT; i++)
        printf("  %-10s%s\n", commands[i]->name, commands[i]->summary);
    puts("\n`nbhd COMMAND --help` tells a command's options. `nbhd --version` tells the version.\n\n"
         "A problem is one line of text, fields in any order, defaults left out:\n"
         "    fwd bf16 b2 h24/8 d128/64 30x48x80 w18x24x24 s16x8x8 r1x1x2 enct extra=512 scale=0.088\n"
         "  fwd, bwd, qk, av, qk_bwd, av_bwd   the pass (fwd)\n"
         "  f32, f64, f16, bf16                the type of the tensors (f32)\n"
         "  bB  hH  hH/HKV                     batch, heads, key/value heads (1)\n"
         "  dD  dD/DV                          head_dim, and that of the values where it differs; required\n"
         "  30x48x80                           length of each axis, slowest first; required\n"
         "  30x40+16x16*3                      a ragged batch: the grids of its sequences; *3 repeats one\n"
         "  kv=8x8                             cross attention: key tokens per axis\n"
         "  w...  s...  r...                   window (the whole axis), stride (1), dilation (1) per axis\n"
         "  e + a letter per axis              n nearest, c causal, t truncated, p periodic (all n)\n"
         "  extra=N  scale=X                   additional keys (0), softmax scale (head_dim^-1/2)\n"
         "  bias  tf32                         with a table of biases; f32 may be multiplied as TF32 (neither)\n\n"
         "exit status: 0 done; 1 a check failed or the computation could not be done; 2 the input or the usage was "
         "wrong.");
    return finish(TOOL_DONE);
}

/* Where the caller closed a standard stream, what is opened next would take its number: sentences would be written into
 * a tensor. So the number is taken by what gives the same error. */
static void hold_streams(void)
{
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0)
            (void)!open("/dev/null", fd ? O_RDONLY : O_WRONLY);
}

static int run_command(int argc, char **argv)
{
    for (int i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(argv[0], commands[i]->name))
            continue;
        running = commands[i]->name;
        return finish(commands[i]->run(argc, argv));
    }
    return tool_fail(TOOL_USAGE, "no command '%s'; `nbhd --help` lists them", argv[0]);
}

int main(int argc, char **argv)
{
    hold_streams();
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow so large has its sentence */
    if (argc < 2)
        return tool_fail(TOOL_USAGE, "which command? `nbhd --help` lists them");
    const char *name = argv[1];
    if (!strcmp(name, "help") && argc > 2)
        return run_command(2, (char *[]){argv[2], (char *)"--help", NULL});
    if (!strcmp(name, "--help") || !strcmp(name, "-h") || !strcmp(name, "help"))
        return help();
    if (!strcmp(name, "--version") || !strcmp(name, "-V")) {
        int version = nbhd_version();
        printf("nbhd %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
        return finish(TOOL_DONE);
    }
    return run_command(argc - 1, argv + 1);
}
