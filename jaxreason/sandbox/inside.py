"""The program inside a sandbox: it runs what a model wrote and answers one request at a
time until its socket closes.

Its text is the argument of `python -c`, so it imports the standard library alone, and
few modules of it. It takes its limits upon itself before the first request. What it
answers is as little to be trusted as the program that it ran: the other side (see
`session`) bounds and checks it.

A request is `run`: a program, in a forked process ("fork") or in this one, whose names
are kept; `call`: a function that a program has defined; `check`: a test, in a forked
process, in which the names that it lacks stand for the functions of the program in
another sandbox. Values cross between the two as plain data (see `encode`): a program's
own `__eq__` never meets a test.
"""

import ast
import builtins
import json
import os
import resource
import select
import signal
import socket
import sys
from contextlib import suppress

LONGEST_ERROR = 2000  # characters
MOST = 1_000_000  # items that are taken from an iterator
WATCH_S = 0.25  # between two counts of the files in /tmp
FILE_BYTES = 4096  # a file counts as one block at least


class Channel:
    """Frames over a socket: a length of four bytes, then JSON."""

    def __init__(self, fd):
        self.socket = socket.socket(fileno=fd)

    def send(self, message):
        data = json.dumps(message).encode()
        self.socket.sendall(len(data).to_bytes(4, "big") + data)

    def receive(self):
        return json.loads(self.exactly(int.from_bytes(self.exactly(4), "big")))

    def exactly(self, count):
        parts = []
        while count:
            part = self.socket.recv(min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


# --- running ---


def main(fd, options, *command):
    """Serve requests; or become the Python of a command line, within the limits."""
    options = json.loads(options)
    limit(options)
    if options["alone"]:
        be_first(int(fd), (options["files_mb"] << 20) // FILE_BYTES)
    if command:
        os.execv(sys.executable, [sys.executable, *command])
    sys.path += options["path"]
    sys.set_int_max_str_digits(0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=False)
    for name in options["imports"]:
        __import__(name)
    channel = Channel(int(fd))
    channel.send({"kind": "ready"})
    names, objects, alone = fresh(), Objects(), options["alone"]
    while True:
        try:
            request = channel.receive()
        except (EOFError, OSError):
            os._exit(0)
        if request["cpu_s"]:
            limit_cpu(request["cpu_s"])
        if request["do"] == "call":
            reply = call(request, names, objects)
        elif request["fork"]:
            reply = forked(request, channel, alone)
        else:
            reply = {"kind": "done", **run(request["code"], names, request["echo"])}
        flush()
        if alone:
            end_others()
        channel.send(reply)


def be_first(fd, most_files):
    """Stay behind as the first process of the namespace, which no signal from inside
    reaches. End with the forked one that returns from here, when the other side of the
    socket is gone, or when /tmp holds too many files; the kernel then ends all others.

    A file system in memory has a limit of bytes, but none of files that bubblewrap
    could set: empty ones would take the machine's memory, and seconds to remove.
    """
    pid = os.fork()
    if pid == 0:
        return
    os.closerange(3, fd)
    os.closerange(fd + 1, 64)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python would raise KeyboardInterrupt
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(fd, 0)  # of the end alone
    while True:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done == pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        if done == 0:
            ready = [number for number, _ in poll.poll(1000 * WATCH_S)]
            if fd in ready or files_in("/tmp") > most_files:
                os._exit(1)
            if woken in ready:
                os.read(woken, 4096)


def files_in(path):
    """Count the files, folders and links of a file system; 0 if it does not count
    them.
    """
    system = os.statvfs(path)
    return system.f_files - system.f_ffree


def limit(options):
    """Take the limits upon this process; become the user `uid` if one is given."""
    mb = 1 << 20
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, options["processes"]),
        (resource.RLIMIT_FSIZE, options["files_mb"] * mb),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_AS, options["memory_mb"] * mb),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CPU, options["session_cpu_s"]),
    ):
        if most is None:
            continue
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    if options["uid"]:
        os.setgroups([])
        os.setresgid(*[options["uid"]] * 3)
        os.setresuid(*[options["uid"]] * 3)


def limit_cpu(seconds):
    """Let the kernel end this process after some more seconds of CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (min(most, hard) if hard != resource.RLIM_INFINITY else most, hard))


def fresh():
    """Return the names of a new main module, in which pickle and dataclasses look."""
    sys.modules["__main__"] = module = type(sys)("__main__")
    module.__builtins__ = builtins
    return module.__dict__


def run(code, names, echo=False):
    """Run a program; `echo` prints the value of a last expression, as a notebook."""
    try:
        tree = ast.parse(code, "<program>")
        last = tree.body.pop() if echo and tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<program>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<program>", "eval"), names)
            if value is not None:
                print(repr(value))
        return {"error": "", "reason": ""}
    except BaseException as error:
        return said(error)


def said(error):
    """Describe an exception in one line, whatever its own methods do."""
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return {"error": "", "reason": ""}
    try:
        line, trace = 0, error.__traceback__
        while trace:  # there may be a million frames
            if trace.tb_frame.f_code.co_filename == "<program>":
                line = trace.tb_lineno
            trace = trace.tb_next
        line = error.lineno if isinstance(error, SyntaxError) and error.lineno else line
        where = f" (line {line})" if line else ""
        words = " ".join((error.msg if isinstance(error, SyntaxError) else str(error))[:LONGEST_ERROR].split())
    except BaseException:
        where, words = "", ""
    name = type(error).__name__[:200]
    told = (f"{name}: {words}" if words else name) + where
    return {"error": told, "reason": "out of memory" if isinstance(error, MemoryError) else "error"}


def forked(request, channel, alone, say=os.write, leave=os._exit):
    """Answer a request in a forked process, which may end as it likes."""
    if alone:
        empty(os.getcwd())
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        reply = {"error": "", "reason": "crashed"}
        try:
            if request["do"] == "check":
                reply = check(request, channel)
            else:
                channel.socket.close()
                give_stdin(request["stdin"])
                if request.get("quiet"):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                reply = run(request["code"], fresh())
        finally:
            try:
                flush()
                say(write, json.dumps(reply).encode())
                leave(0)
            finally:
                leave(1)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    os.set_blocking(read, False)
    try:
        reply = json.loads(os.read(read, 1 << 16))
        reply = {"error": str(reply["error"]), "reason": str(reply["reason"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        reply = ended(status)
    os.close(read)
    return {"kind": "done", **reply}


def ended(status):
    """Describe the end of a process that left no word."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return {"error": f"ended by signal {number}", "reason": "timeout" if number == signal.SIGXCPU else "crashed"}
    code = os.WEXITSTATUS(status)
    return {"error": f"SystemExit: {code}" if code else "", "reason": "error" if code else ""}


def give_stdin(text):
    path = os.path.join(os.getcwd(), ".stdin")
    with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        file.write(text)
    fd = os.open(path, os.O_RDONLY)
    os.unlink(path)
    os.dup2(fd, 0)
    os.close(fd)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115


def flush():
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(BaseException):
            stream.flush()


def end_others(kill=os.kill, wait=os.waitpid):
    """End the processes that the program left; in a process namespace, -1 is all of
    them but the first and this one.
    """
    try:
        kill(-1, signal.SIGKILL)
        while True:
            wait(-1, 0)
    except OSError:
        pass


def empty(folder):
    """Remove what an earlier program left in its folder, whatever it is. What can't be
    removed is left.
    """
    left = set()
    while names := set(os.listdir(folder)) - left:
        for name in names:
            try:
                remove_one(folder, os.path.join(folder, name))
            except OSError:
                left.add(name)


def remove_one(folder, path):
    """Remove a file, or a folder after its own folders have moved up into `folder`:
    neither recursion nor a path grows with their depth.
    """
    if os.path.islink(path) or not os.path.isdir(path):
        return os.unlink(path)
    os.chmod(path, 0o700)
    for name in os.listdir(path):
        within = os.path.join(path, name)
        if os.path.islink(within) or not os.path.isdir(within):
            os.unlink(within)
        else:
            os.chmod(within, 0o700)  # a folder that moves is written to
            os.rename(within, os.path.join(folder, os.urandom(16).hex()))
    os.rmdir(path)


# --- values between sandboxes ---


class Objects:
    """Values of a program that are no plain data; others hold their numbers."""

    def __init__(self):
        self.kept = []

    def number(self, value):
        self.kept.append(value)
        return len(self.kept) - 1


def encode(value, number):
    """Write plain data in JSON values; `number` gives a number to any other value.

    Subclasses of plain types become the plain type: what they override stays behind.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind, tag in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
        if isinstance(value, kind):
            return [tag, [encode(item, number) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, number), encode(item, number)] for key, item in dict.items(value)]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__ if type(value) in (bytes, bytearray) else "bytes", bytes(value).hex()]
    if type(value) is complex:
        return ["complex", [value.real, value.imag]]
    for kind, plain in ((int, int.__add__), (float, float.__add__)):
        if isinstance(value, kind):
            return plain(value, kind(0))
    if isinstance(value, str):
        return str.__str__(value)
    if type(value) is range:
        return ["range", [value.start, value.stop, value.step]]
    if type(value).__module__ in ("decimal", "fractions"):
        return [type(value).__name__, str(value)]
    if type(value).__module__ == "numpy":
        return encode(value.tolist(), number)
    return ["object", [number(value), type(value).__name__]]


PLAIN = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def decode(data, thing):
    """Read what `encode` wrote; `thing(number, type_name)` makes any other value."""
    if not isinstance(data, list):
        return data
    tag, body = data
    if tag in PLAIN:
        return PLAIN[tag](decode(item, thing) for item in body)
    if tag == "dict":
        return {decode(key, thing): decode(item, thing) for key, item in body}
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag).fromhex(body)
    if tag in ("Decimal", "Fraction"):
        return getattr(__import__("decimal" if tag == "Decimal" else "fractions"), tag)(body)
    return {"complex": complex, "range": range}.get(tag, thing)(*body)


def call(request, names, objects):
    """Call a function of the program, or a method of one of its objects."""
    try:
        of, path, given = json.loads(request["call"])
        arguments, keywords = decode(given, lambda number, _: objects.kept[number])
        value = names if of is None else objects.kept[of]
        for position, name in enumerate(path):
            value = value[name] if position == 0 and of is None else getattr(value, name)
        before = json.dumps([encode(item, lambda _: -1) for item in arguments])
        found = list_of(value) if path[-1:] == ["__iter__"] else value(*arguments, **keywords)
        after = [encode(item, lambda _: -1) for item in arguments]
        answer = {"value": encode(found, objects.number), "after": after if json.dumps(after) != before else None}
    except BaseException as error:
        answer = {"raised": [type(error).__name__, said(error)["error"]]}
    return {"kind": "value", "answer": json.dumps(answer)}


def list_of(value):
    return [item for item, _ in zip(value(), range(MOST))]


class ProgramError(Exception):
    """An exception of the program that is none of Python's own."""


class Unfit(Exception):
    """A test that can't be run across sandboxes. No exception that a program raises
    becomes one: see `ask`.
    """


def check(request, channel):
    """Run a test; it passes if it raises nothing."""

    class Remote:
        """A function or an object of the program, in its own sandbox."""

        def __init__(self, of, path, shown):
            self.__dict__.update(_of=of, _path=path, _shown=shown)

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Remote(self._of, [*self._path, name], name)

        def __call__(self, *arguments, **keywords):
            return ask(self._of, self._path, arguments, keywords)

        def __iter__(self):
            return iter(ask(self._of, [*self._path, "__iter__"], (), {}))

        def __next__(self):
            return ask(self._of, [*self._path, "__next__"], (), {})

        def __len__(self):
            try:
                return ask(self._of, [*self._path, "__len__"], (), {})
            except AttributeError:
                raise TypeError("it has no length") from None  # as list() expects of an iterator

        def __getitem__(self, key):
            return ask(self._of, [*self._path, "__getitem__"], (key,), {})

        def __bool__(self):
            return True

        def __repr__(self):
            return f"<{self._shown} of the program>"

    def reference(value):
        if isinstance(value, Remote) and value._of is not None:
            return value._of
        raise Unfit(f"a test may give a program plain data and the program's own objects, not {type(value).__name__}")

    def ask(of, path, arguments, keywords):
        channel.send({"kind": "call", "call": json.dumps([of, path, encode([list(arguments), keywords], reference)])})
        answer = json.loads(channel.receive()["answer"])
        if "raised" in answer:
            name, words = answer["raised"]
            kind = getattr(builtins, str(name), None)
            known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)
            raise (kind if known else ProgramError)(str(words))
        for given, after in zip(arguments, answer["after"] or ()):
            update(given, decode(after, lambda number, shown: None))
        return decode(answer["value"], lambda number, shown: Remote(number, [], str(shown)))

    try:
        names = {"__name__": "test", "__builtins__": builtins, "as_lists": as_lists}
        tree = ast.parse(request["code"], "<program>")
        names.update({name: Remote(None, [name], name) for name in unbound(tree) | set(request["names"])})
        exec(compile(tree, "<program>", "exec"), names)
        return {"error": "", "reason": ""}
    except BaseException as error:
        return said(error)


def update(given, after):
    """Let an argument that the program changed in place change here too."""
    if type(given) is not type(after) or given == after:
        return
    if isinstance(given, list | bytearray):
        given[:] = after
    elif isinstance(given, dict | set):
        given.clear()
        given.update(after)


def as_lists(value):
    """Write tuples as lists, as data sets in JSON do."""
    if isinstance(value, list | tuple):
        return [as_lists(item) for item in value]
    return {str(key): as_lists(item) for key, item in value.items()} if isinstance(value, dict) else value


def unbound(tree):
    """Return the names that a test reads and neither binds nor has from Python."""
    read, bound = set(), set(dir(builtins)) | {"as_lists"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound


if __name__ == "__main__":
    main(*sys.argv[1:])
