/* Pictures and letters of a view. */
#ifndef NBHD_TOOL_MASK_DRAW_H
#define NBHD_TOOL_MASK_DRAW_H

#include "mask_view.h"

/* To path, .svg or .png. Exit status. */
int mask_draw(const struct view *v, const char *path);
/* The same in letters on stdout. */
void mask_print(const struct view *v);

#endif
