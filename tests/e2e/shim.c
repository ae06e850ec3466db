/* A mounted Drive, or the worst of NFS, for whatever lies under SHIM_ROOT: no symbolic or hard links, no locks (flock,
   lockf, fcntl), no rename of a folder. With SHIM_CLOCK set, the wall clock jumps a day to and fro every second. Loaded by
   LD_PRELOAD; every refusal, and every rename of a file, which goes through, is a line of the file SHIM_LOG. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static void note(const char *what) {
  const char *log = getenv("SHIM_LOG");
  if (!log) return;
  int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (fd < 0) return;
  (void)!write(fd, what, strlen(what));
  (void)!write(fd, "\n", 1);
  close(fd);
}

static int under(const char *full) {
  const char *root = getenv("SHIM_ROOT");
  return root && strncmp(full, root, strlen(root)) == 0;
}

/* Whether a path that need not exist yet lies under the root: its folder is looked up. */
static int path_under(const char *path) {
  char folder[PATH_MAX], full[PATH_MAX];
  snprintf(folder, sizeof folder, "%s", path);
  char *slash = strrchr(folder, '/');
  if (slash == folder) return 0;
  if (slash) *slash = 0; else snprintf(folder, sizeof folder, ".");
  return realpath(folder, full) && under(full);
}

static int fd_under(int fd) {
  char name[64], full[PATH_MAX];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(name, full, sizeof full - 1);
  if (n < 0) return 0;
  full[n] = 0;
  return under(full);
}

static int refuse(const char *what) { note(what); errno = EOPNOTSUPP; return -1; }
#define REAL(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)

int symlink(const char *to, const char *at) { return path_under(at) ? refuse("symlink") : REAL(symlink, to, at); }
int symlinkat(const char *to, int fd, const char *at) {
  return path_under(at) ? refuse("symlink") : REAL(symlinkat, to, fd, at);
}
int link(const char *from, const char *to) { return path_under(to) ? refuse("link") : REAL(link, from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
  return path_under(to) ? refuse("link") : REAL(linkat, a, from, b, to, flags);
}
int flock(int fd, int how) { return fd_under(fd) ? refuse("flock") : REAL(flock, fd, how); }
int lockf(int fd, int how, off_t bytes) { return fd_under(fd) ? refuse("lockf") : REAL(lockf, fd, how, bytes); }
int lockf64(int fd, int how, off64_t bytes) { return fd_under(fd) ? refuse("lockf") : REAL(lockf64, fd, how, bytes); }

/* Locks of a process and of an open file; on 64 bits F_SETLK64 and F_SETLKW64 are the same numbers. */
static int locks(int command) {
  return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}
/* The third argument is a number, a pointer, or not there: all are passed on as a pointer is. */
#define FCNTL(name)                                                              \
  int name(int fd, int command, ...) {                                           \
    va_list rest;                                                                \
    va_start(rest, command);                                                     \
    void *argument = va_arg(rest, void *);                                       \
    va_end(rest);                                                                \
    if (locks(command) && fd_under(fd)) return refuse("fcntl");                  \
    return REAL(name, fd, command, argument);                                    \
  }
FCNTL(fcntl)
FCNTL(fcntl64)

static int is_folder(const char *path) { struct stat s; return stat(path, &s) == 0 && S_ISDIR(s.st_mode); }
static int refuses_rename(const char *from, const char *to) {
  if (!path_under(to)) return 0;
  if (is_folder(from)) return 1;
  note("rename of a file");
  return 0;
}
int rename(const char *from, const char *to) {
  return refuses_rename(from, to) ? refuse("rename of a folder") : REAL(rename, from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
  return refuses_rename(from, to) ? refuse("rename of a folder") : REAL(renameat, a, from, b, to);
}

static long jump(void) {
  if (!getenv("SHIM_CLOCK")) return 0;
  struct timespec t;
  REAL(clock_gettime, CLOCK_MONOTONIC, &t);
  return t.tv_sec % 2 ? 86400 : -86400;
}
int clock_gettime(clockid_t id, struct timespec *t) {
  int status = REAL(clock_gettime, id, t);
  if (status == 0 && id == CLOCK_REALTIME) t->tv_sec += jump();
  return status;
}
time_t time(time_t *at) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  if (at) *at = t.tv_sec;
  return t.tv_sec;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  (void)zone;
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  at->tv_sec = t.tv_sec;
  at->tv_usec = t.tv_nsec / 1000;
  return 0;
}
