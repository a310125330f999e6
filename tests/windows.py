"""Runs scripts of this project, one after the other, under rules of Windows:

    python tests/windows.py train.py … then infer.py …    # one process, one time for the imports

Modules, signals and functions that Windows lacks are gone. A directory can't be opened. A rename
replaces no directory. What this process has open, or has mapped into its memory, can't be deleted
or renamed, nor can a directory that holds it.
"""

import builtins
import errno
import os
import runpy
import shutil
import signal
import sys
import types
from pathlib import Path


def paths_in_use():
    """→ the paths of all files that this process has open or mapped"""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the one that listdir used
            pass
    with open_file("/proc/self/maps") as maps:
        found |= {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count("/")}
    return found


def check_unused(path):
    # filelock deletes open files where it finds neither fcntl nor Windows. tests/test_files.py
    # tests what becomes of a lock file that can't be deleted.
    if ".lock" in os.path.basename(path):
        return
    path = os.path.realpath(path) if not os.path.islink(path) else os.path.abspath(path)
    for used in paths_in_use():
        if used == path or used.startswith(path + os.sep):
            raise PermissionError(errno.EACCES, "another process is using it", path)


def guarded(function, replaces_files):
    """→ os.rename or os.replace, as Windows has it"""

    def move(source, target, **options):
        if os.path.isdir(target) or (os.path.exists(target) and not replaces_files):
            raise PermissionError(errno.EACCES, "it exists already", os.fspath(target))
        for path in (source, target):
            check_unused(path)
        return function(source, target, **options)

    return move


def remove(path, **options):
    check_unused(path)
    return unlink(path, **options)


def open_descriptor(path, flags, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "it is a directory", os.fspath(path))
    return os_open(path, flags, *rest, **options)


def flush(descriptor):
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    with open_file(f"/proc/self/fdinfo/{number}") as file:
        flags = int(file.read().partition("flags:")[2].split()[0], 8)
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "it is open for reading only")
    return fsync(descriptor)


def import_module(name, globals=None, *rest, **options):
    """Libraries look at sys.platform. So only this project's own modules are kept from more."""
    is_ours = str((globals or {}).get("__file__", "")).startswith(ROOT)
    if is_ours and name in ("resource", "termios", "pwd", "grp", "readline"):
        raise ImportError(f"No module named {name!r}")
    return plain_import(name, globals, *rest, **options)


ROOT = str(Path(__file__).parents[1])
plain_import = builtins.__import__
unlink, os_open, fsync, open_file = os.unlink, os.open, os.fsync, builtins.open


def impose():
    """Imposes the rules on this process, all but those on imports."""
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT"):
        delattr(signal, name)
    for name in ("sched_getaffinity", "fork", "statvfs"):
        delattr(os, name)
    shutil._use_fd_functions = False  # rmtree then calls what is replaced here
    usage = types.SimpleNamespace(total=2**40, used=0, free=2**40)
    shutil.disk_usage = lambda path: usage  # it calls statvfs
    os.unlink = os.remove = remove
    os.open, os.fsync = open_descriptor, flush
    os.rename, os.replace = guarded(os.rename, False), guarded(os.replace, True)


if __name__ == "__main__":
    sys.modules["fcntl"] = None
    builtins.__import__ = import_module
    impose()
    commands = [[]]
    for word in sys.argv[1:]:
        if word == "then":
            commands.append([])
        else:
            commands[-1].append(word)
    sys.path[0] = ROOT
    for script, *arguments in commands:
        sys.argv = [os.path.join(ROOT, script), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
