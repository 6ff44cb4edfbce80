/* Loaded before User-Mode Linux, whose 6.1 sets the vector registers of its processes as it got them: without those of
 * AMX. A host that has AMX takes all of them or none (EFAULT), and the guest would die with its first process. What is
 * missing is put behind here, as it is at the moment. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char whole[1 << 16];

long ptrace(enum __ptrace_request request, ...)
{
    va_list rest;
    va_start(rest, request);
    long pid = va_arg(rest, int);
    void *address = va_arg(rest, void *), *data = va_arg(rest, void *);
    va_end(rest);

    struct iovec all = {whole, sizeof whole}, *given = data;
    if (request == PTRACE_SETREGSET && syscall(SYS_ptrace, PTRACE_GETREGSET, pid, address, &all) == 0
        && all.iov_len > given->iov_len) {
        memcpy(whole, given->iov_base, given->iov_len);
        data = &all;
    }
    if (request != PTRACE_PEEKTEXT && request != PTRACE_PEEKDATA && request != PTRACE_PEEKUSER)
        return syscall(SYS_ptrace, request, pid, address, data);
    long word, failed = syscall(SYS_ptrace, request, pid, address, &word);
    errno = failed ? errno : 0;
    return failed ? failed : word;
}
