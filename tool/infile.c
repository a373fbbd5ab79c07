/* See infile.h. */
#include "infile.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tool.h"

int infile_map(void **map, size_t *bytes, const char *path)
{
    struct stat s;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return tool_fail(TOOL_USAGE, "%s: %s", path, strerror(errno));
    int status = TOOL_DONE;
    if (fstat(fd, &s) || !S_ISREG(s.st_mode))
        status = tool_fail(TOOL_USAGE, "%s: not a regular file", path);
    else if (!s.st_size)
        status = tool_fail(TOOL_USAGE, "%s: it is empty", path);
    if (!status) {
        *bytes = (size_t)s.st_size;
        *map = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (*map == MAP_FAILED) {
            *map = NULL;
            status = tool_fail(TOOL_FAILED, "%s: cannot be mapped: %s", path, strerror(errno));
        }
    }
    close(fd);
    return status;
}
