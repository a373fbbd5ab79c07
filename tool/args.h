/* Command-line arguments: a table of options gives both the parser and the text of --help. */
#ifndef NBHD_TOOL_ARGS_H
#define NBHD_TOOL_ARGS_H

#include <stdbool.h>

/* "7x7" */
struct extents {
    int count, at[3];
};

struct option {
    const char *name; /* without the dashes; NULL ends the table */
    char letter;      /* 0: none */
    int kind;
    void *value;
    double min, max;
    const char *const *choices; /* ends with NULL */
    const char *metavar, *help;
};

struct option opt_flag(const char *name, char letter, bool *value, const char *help);
struct option opt_text(const char *name, char letter, const char **value, const char *metavar, const char *help);
struct option opt_int(const char *name, char letter, int *value, int min, int max, const char *metavar,
                      const char *help);
struct option opt_real(const char *name, char letter, double *value, double min, double max, const char *metavar,
                       const char *help);
struct option opt_extents(const char *name, char letter, struct extents *value, const char *metavar,
                          const char *help);
/* *value becomes the index into choices. */
struct option opt_choice(const char *name, char letter, int *value, const char *const *choices, const char *metavar,
                         const char *help);
/* Shared by the commands that make plans. */
struct option opt_deterministic(bool *value);
struct option opt_end(void);

struct usage {
    const char *synopsis; /* "nbhd run Q K V -o OUT [OPTIONS]" */
    const char *about;    /* paragraphs above the options */
    const struct option *options;
    int operands_min, operands_max;
    const char *operands_name; /* "three tensors, Q K V" */
};

enum { ARGS_GO_ON = -1 };
/* Moves the operands to the front of argv and sets *count to their number. Returns ARGS_GO_ON, or the exit status
 * after --help or a mistake, which has then been told. */
int args_parse(const struct usage *usage, int argc, char **argv, int *count);

extern const char *const device_choices[]; /* in the order of nbhd_device */

#endif
