"""What files do, told as JSON.

Runs on this machine's Python and in the sandbox with `base`, an empty
directory; both must tell the same.
"""

import errno
import json
import os
import shutil

told = {}


def tell(name, action):
    try:
        told[name] = action()
    except OSError as error:
        told[name] = errno.errorcode.get(error.errno, error.errno)


def write(name, content, mode="wb", **options):
    with open(name, mode, **options) as file:
        return file.write(content)


def read(name):
    with open(name, "rb") as file:
        return file.read().decode("latin-1")


def patch(name, offset, content):
    with open(name, "r+b") as file:
        file.seek(offset)
        file.write(content)
    return read(name)


def truncate(name, size):
    os.truncate(name, size)
    return read(name)


def with_fd(name, flags, action):
    fd = os.open(name, flags)
    try:
        return action(fd)
    finally:
        os.close(fd)


def unlinked(name):
    with open(name, "w+b") as file:
        os.unlink(name)
        file.write(b"still here")
        file.seek(6)
        return file.read().decode(), os.fstat(file.fileno()).st_nlink, os.path.exists(name)


def identities(*names):
    seen = [(os.stat(name).st_dev, os.stat(name).st_ino) for name in names]
    return [seen.index(identity) for identity in seen]


def times(name):
    os.utime(name, (1_000_000_000, 1_234_567_890.5))
    return os.stat(name).st_atime, os.stat(name).st_mtime


def walk(name):
    return sorted((root[len(base) :], sorted(dirs), sorted(files)) for root, dirs, files in os.walk(name))


def scan(name):
    with os.scandir(name) as entries:
        return sorted((entry.name, entry.is_dir(), entry.is_file(), entry.is_symlink()) for entry in entries)


def lines(name):
    with open(name, "w+", encoding="utf-8") as file:
        file.write("one\ntwo\n")
        file.seek(0)
        file.readline()
        at = file.tell()
        file.write("three\n")
        file.seek(at)
        return file.read()


def listing_while_it_changes(name):
    os.mkdir(name)
    for number in range(300):
        write(f"{name}/{number}", b"")
    with os.scandir(name) as entries:
        for entry in entries:
            os.unlink(entry.path)
    return len(os.listdir(name))


at = base + "/"
tell("missing", lambda: read(at + "missing"))
tell("write", lambda: write(at + "f", b"content"))
tell("read", lambda: read(at + "f"))
tell("size", lambda: os.path.getsize(at + "f"))
tell("append", lambda: (write(at + "f", b"+more", "ab"), read(at + "f")))
tell("exclusive", lambda: write(at + "f", b"", "xb"))
tell("exclusive new", lambda: write(at + "x", b"x", "xb"))
tell("patch", lambda: patch(at + "f", 2, b"NN"))
tell("hole", lambda: patch(at + "f", 20, b"end"))
tell("grow", lambda: len(truncate(at + "f", 100_000)))
tell("shrink", lambda: truncate(at + "f", 3))
tell("grow again", lambda: truncate(at + "f", 6))
tell("truncate", lambda: (write(at + "f", b"new"), read(at + "f")))
tell("text", lambda: lines(at + "text"))
tell("large", lambda: (write(at + "large", bytes(range(256)) * 4000), hash(read(at + "large")) == hash(bytes(range(256)).decode("latin-1") * 4000)))
tell("pread", lambda: with_fd(at + "large", os.O_RDONLY, lambda fd: os.pread(fd, 5, 255).hex()))
tell("pwrite", lambda: with_fd(at + "large", os.O_RDWR, lambda fd: (os.pwrite(fd, b"12", 70_000), os.pread(fd, 4, 69_999).hex())))
tell("seek end", lambda: with_fd(at + "large", os.O_RDONLY, lambda fd: (os.lseek(fd, -3, os.SEEK_END), os.read(fd, 10).hex(), os.read(fd, 10).hex())))
tell("read a file opened for writing", lambda: with_fd(at + "f", os.O_WRONLY, lambda fd: os.read(fd, 1).hex()))
tell("write a file opened for reading", lambda: with_fd(at + "f", os.O_RDONLY, lambda fd: os.write(fd, b"x")))
tell("append and patch", lambda: with_fd(at + "f", os.O_WRONLY | os.O_APPEND, lambda fd: (os.write(fd, b"1"), os.write(fd, b"2"), read(at + "f"))))
tell("fsync", lambda: with_fd(at + "f", os.O_RDWR, os.fsync))
tell("unlinked", lambda: unlinked(at + "gone"))
tell("mkdir", lambda: os.mkdir(at + "d"))
tell("mkdir again", lambda: os.mkdir(at + "d"))
tell("mkdir on a file", lambda: os.mkdir(at + "f"))
tell("mkdir below nothing", lambda: os.mkdir(at + "no/d"))
tell("mkdir below a file", lambda: os.mkdir(at + "f/d"))
tell("makedirs", lambda: os.makedirs(at + "d/e/f/g"))
tell("dots", lambda: (write(at + "d/./e/../dots", b"dots"), read(at + "d//dots")))
tell("slash behind a file", lambda: read(at + "f/"))
tell("open a directory", lambda: read(at + "d"))
tell("open a directory to write", lambda: write(at + "d", b""))
tell("list", lambda: sorted(os.listdir(base)))
tell("list a file", lambda: os.listdir(at + "f"))
tell("list nothing", lambda: os.listdir(at + "no"))
tell("scan", lambda: scan(base))
tell("walk", lambda: walk(at + "d"))
tell("rmdir full", lambda: os.rmdir(at + "d"))
tell("rmdir a file", lambda: os.rmdir(at + "f"))
tell("rmdir nothing", lambda: os.rmdir(at + "no"))
tell("unlink nothing", lambda: os.unlink(at + "no"))
tell("unlink a directory", lambda: os.unlink(at + "d"))
tell("rename", lambda: (os.rename(at + "x", at + "d/y"), read(at + "d/y")))
tell("rename over", lambda: (write(at + "z", b"z"), os.replace(at + "z", at + "d/y"), read(at + "d/y"), os.path.exists(at + "z")))
tell("rename to itself", lambda: (os.rename(at + "f", at + "f"), read(at + "f")))
tell("rename nothing", lambda: os.rename(at + "no", at + "f"))
tell("rename a directory", lambda: (os.rename(at + "d/e", at + "e"), walk(at + "e")))
tell("rename into itself", lambda: os.rename(at + "e", at + "e/f/inner"))
tell("rename a file over a directory", lambda: os.rename(at + "f", at + "e"))
tell("rename a directory over a file", lambda: os.rename(at + "e", at + "f"))
tell("rename over a full directory", lambda: os.rename(at + "e", at + "d"))
tell("rename over an empty directory", lambda: (os.mkdir(at + "empty"), os.rename(at + "e", at + "empty"), walk(at + "empty")))
tell("identities", lambda: identities(at + "f", at + "d", at + "d/../f", at + "large", at + "d/."))
tell("same open", lambda: with_fd(at + "f", os.O_RDONLY, lambda fd: os.fstat(fd).st_ino == os.stat(at + "f").st_ino))
tell("times", lambda: times(at + "f"))
tell("times of a directory", lambda: times(at + "d"))
tell("kinds", lambda: [os.path.isfile(at + "f"), os.path.isdir(at + "f"), os.path.isdir(at + "d"), os.path.islink(at + "f")])
tell("readlink", lambda: os.readlink(at + "f"))
tell("unicode", lambda: (write(at + "grün €", b"u"), [name for name in os.listdir(base) if name > "z" or " " in name]))
tell("long name", lambda: write(at + "n" * 256, b""))
tell("longest name", lambda: write(at + "n" * 255, b""))
tell("nul", lambda: os.path.exists(at + "a\0b"))
tell("listing while it changes", lambda: listing_while_it_changes(at + "many"))
tell("copy", lambda: shutil.copytree(at + "empty", at + "copy") and walk(at + "copy"))
tell("rmtree", lambda: shutil.rmtree(at + "empty"))
tell("move", lambda: shutil.move(at + "f", at + "moved") and read(at + "moved"))
tell("huge offset", lambda: with_fd(at + "moved", os.O_RDWR, lambda fd: os.pread(fd, 10, 2**62).hex()))
tell("left", lambda: walk(base))

result = told
if __name__ == "__main__":
    print(json.dumps(told))
