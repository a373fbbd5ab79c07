/* One JSON object a line on stdout. */
#ifndef NBHD_TOOL_JSON_H
#define NBHD_TOOL_JSON_H

#include <stdbool.h>

struct json {
    bool comma; /* something stands before the next member */
};

struct json json_begin(void);
void json_text(struct json *j, const char *name, const char *value); /* value NULL: null */
void json_real(struct json *j, const char *name, double value);      /* not finite: null */
void json_bool(struct json *j, const char *name, bool value);
void json_list(struct json *j, const char *name); /* of objects */
void json_object(struct json *j);                 /* an object within a list */
void json_object_end(struct json *j);
void json_list_end(struct json *j);
/* Whether text is UTF-8, as JSON's strings must be. */
bool json_can_hold(const char *text);
void json_end(struct json *j); /* ends the line */

#endif
