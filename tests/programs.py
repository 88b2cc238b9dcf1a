"""Programs that attack a sandbox, with what must be seen of each.

An attempt is an expression; a program prints "GOT" and its value if it succeeds, else
the name of the exception. {secret}, {port}, {pid}, {unix} and {mark} are filled in by
the test: a file of the user, a server, the parent, a socket, a name to look for later.
"""

import contextlib
import os
from pathlib import Path

PRELUDE = """
import os, sys, socket, ctypes, subprocess, signal, resource, threading
libc = ctypes.CDLL(None, use_errno=True)
def c(name, *arguments):
    if libc[name](*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return True
def reach(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as s:
        s.settimeout(2)
        s.connect(address)
        return True
def wrote(path, mode="w"):
    with open(path, mode) as file:
        file.write("x" if "b" not in mode else b"x")
    return path
def ran(*command):
    done = subprocess.run(command, capture_output=True, timeout=5)
    if done.returncode:
        raise OSError(done.stderr.decode())
    return done.stdout
def attempt(f):
    try:
        print("GOT", f())
    except BaseException as error:
        print("held:", type(error).__name__, error)
"""

# Each must fail.
READS = [
    "open('{secret}').read()",
    "os.stat('{secret}')",
    "os.environ['JAXREASON_SECRET']",
    "os.listdir('/home')",
    "os.listdir('/root')",
    "os.listdir('/proc')",
    "os.listdir('/sys')",
    "os.listdir('/var')",
    "os.listdir('/run')",
    "os.listdir('/mnt')",
    "os.listdir('/dev/shm')",
    "os.listdir('/dev/pts')",
    "open('/etc/passwd').read()",
    "open('/etc/shadow').read()",
    "open('/etc/hostname').read()",
    "open('/etc/resolv.conf').read()",
    "open('/proc/self/environ').read()",
    "open('/proc/1/environ').read()",
    "open('/proc/{pid}/environ').read()",
    "os.listdir('/proc/1/root')",
    "os.listdir('/proc/self/cwd/..')",
    "open('/proc/self/mem', 'rb').read(1)",
    "open('/proc/kcore', 'rb').read(1)",
    "open('/proc/mounts').read()",
    "open('/dev/mem', 'rb').read(1)",
    "open('/dev/kmsg', 'rb').read(1)",
    "open('/dev/sda', 'rb').read(1)",
    "open('/dev/vda', 'rb').read(1)",
    "open('/dev/tty').read()",
    "open('/dev/fuse', 'rb')",
    "open('/dev/kvm', 'rb')",
    "open('/.dockerenv').read()",
    "[os.symlink('/root', '/tmp/a'), os.listdir('/tmp/a')]",
    "[os.symlink('{secret}', '/tmp/b'), open('/tmp/b').read()]",
    "[os.symlink('/proc/self/root', '/tmp/d'), os.listdir('/tmp/d')]",
    "os.listdir('/tmp/../root')",
    "open('/tmp/../../../../../../{secret}').read()",
    "open(b'{secret}').read()",
    "open(os.path.expanduser('~/.bashrc')).read()",
    "open(os.path.expanduser('~/.ssh/id_rsa')).read()",
    "__import__('pwd').getpwuid(0).pw_dir",
    "__import__('jaxreason')",
    "__import__('pip')",
    "__import__('numpy')",
    "os.readlink('/proc/self/exe')",
    "os.readlink('/proc/self/ns/pid')",
]
WRITES = [
    "wrote('/{mark}')",
    "wrote('/usr/{mark}')",
    "wrote('/usr/lib/{mark}')",
    "wrote('/etc/{mark}')",
    "wrote('/dev/{mark}')",
    "wrote('/dev/shm/{mark}')",
    "wrote('/home/{mark}')",
    "wrote('/var/tmp/{mark}')",
    "wrote('/proc/sys/kernel/core_pattern')",
    "wrote('/proc/sysrq-trigger')",
    "wrote('/sys/kernel/{mark}')",
    "wrote(os.__file__)",
    "wrote(os.__file__, 'a')",
    "wrote(os.path.join(os.path.dirname(os.__file__), '{mark}.py'))",
    "wrote(sys.executable, 'ab')",
    "wrote('{secret}', 'a')",
    "wrote('/tmp/../{mark}')",
    "[os.symlink('/', '/tmp/root'), wrote('/tmp/root/{mark}')]",
    "os.mkdir('/{mark}')",
    "os.mkdir('/usr/{mark}')",
    "os.mkfifo('/{mark}')",
    "os.mknod('/tmp/sda', 0o60660, os.makedev(8, 0))",
    "os.mknod('/tmp/mem', 0o20660, os.makedev(1, 1))",
    "os.symlink('/tmp', '/{mark}')",
    "os.link(os.__file__, '/tmp/os.py')",
    "os.link('/usr/bin/env', '/usr/bin/{mark}')",
    "os.rename('/usr', '/{mark}')",
    "os.rename(os.__file__, '/tmp/os.py')",
    "os.remove(os.__file__)",
    "os.rmdir('/dev')",
    "os.chmod(os.__file__, 0o777)",
    "os.chmod('/', 0o777)",
    "os.chown(os.__file__, os.getuid(), os.getgid())",
    "[wrote('/tmp/mine'), os.chown('/tmp/mine', 0, 0)]",
    "os.truncate(os.__file__, 0)",
    "os.utime(os.__file__)",
    "os.setxattr(os.__file__, 'user.x', b'x')",
    "__import__('shutil').rmtree('/usr/share')",
    "__import__('shutil').copy('/usr/bin/env', '/usr/bin/{mark}')",
    "ran('/bin/sh', '-c', 'echo x > /{mark}')",
    "ran('/bin/sh', '-c', 'rm /usr/bin/env')",
]
NETWORK = [
    "reach(socket.AF_INET, ('127.0.0.1', {port}))",
    "reach(socket.AF_INET, ('10.0.0.1', 80))",
    "reach(socket.AF_INET6, ('::1', {port}))",
    "reach(socket.AF_INET, ('127.0.0.1', {port}), socket.SOCK_DGRAM)",
    "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "socket.socket(40, socket.SOCK_STREAM)",
    "socket.socket(38, socket.SOCK_SEQPACKET)",
    "reach(socket.AF_UNIX, '{unix}')",
    "reach(socket.AF_UNIX, '\\0{mark}')",
    "reach(socket.AF_UNIX, '/run/docker.sock')",
    "socket.create_connection(('127.0.0.1', {port}), 2)",
    "socket.create_server(('127.0.0.1', 0))",
    "__import__('urllib.request').request.urlopen('http://127.0.0.1:{port}/', timeout=2)",
    "socket.gethostbyname('example.com')",
    "ran('/bin/sh', '-c', 'exec 3<>/dev/tcp/127.0.0.1/{port}')",
    "ran(sys.executable, '-c', 'import socket; socket.create_connection((\"127.0.0.1\", {port}), 2)')",
]
POWERS = [
    "os.kill({pid}, 0)",
    "os.kill({pid}, 9)",
    "os.killpg({pid}, 9)",
    "os.pidfd_open({pid})",
    "os.sched_setaffinity({pid}, [0])",
    "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "os.setuid(0)",
    "os.setgid(0)",
    "os.setgroups([0])",
    "os.seteuid(0)",
    "os.chroot('/tmp')",
    "os.nice(-5)",
    "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "socket.sethostname('x')",
    "c('unshare', 0x10000000)",
    "c('unshare', 0x00020000)",
    "c('setns', 0, 0)",
    "c('mount', b'none', b'/tmp', b'tmpfs', 0, b'')",
    "c('umount2', b'/tmp', 2)",
    "c('ptrace', 0, 0, 0, 0)",
    "c('ptrace', 16, 1, 0, 0)",
    "c('clone', None, None, 0x10000000, None)",
    "c('syscall', 435, 0, 88)",
    "c('prctl', 38, 0, 0, 0, 0)",
    "c('prctl', 24, 0, 0, 0, 0)",
    "resource.setrlimit(resource.RLIMIT_NPROC, (10**4, 10**4))",
    "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, 2**40))",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    "resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
    "resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))",
    "__import__('fcntl').ioctl(0, 0x5412, b'x')",
    "__import__('fcntl').ioctl(1, 0x5412, b'x')",
    "__import__('multiprocessing.shared_memory').shared_memory.SharedMemory(create=True, size=10)",
    "ran('/usr/bin/mount', '-t', 'tmpfs', 'none', '/tmp')",
    "ran('/usr/bin/unshare', '-Ur', 'true')",
    "ran('/usr/bin/nsenter', '-t', '1', '-m', 'true')",
    "ran('/usr/bin/bwrap', '--ro-bind', '/', '/', 'true')",
    "ran('/usr/bin/su', '-c', 'true')",
    "ran('/usr/bin/chsh', '-s', '/bin/sh')",
]
ESCAPES = READS + WRITES + NETWORK + POWERS

# Name -> (program, reasons that may be seen, text that must be seen in output or error).
ENDS = "", "error"  # it ended by itself, well or with an exception
ENDLESS = ("timeout",)
BOMBS = {
    "fork once more than allowed": (
        "try:\n    for _ in range(1000):\n        if os.fork() == 0: signal.pause()\nexcept OSError as error: print(error)",
        ("",),
        "temporarily unavailable",
    ),
    "fork bomb": ("while True:\n    try: os.fork()\n    except OSError: pass", ENDLESS, ""),
    "fork bomb of a shell": ("subprocess.run(['/bin/sh', '-c', 'f() { f | f & }; f; sleep 100'])", ("timeout", *ENDS), ""),
    "children that wait": ("for _ in range(4):\n    if os.fork() == 0: signal.pause()", ("",), ""),
    "a daemon": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\n    os._exit(0)",
        ("",),
        "",
    ),
    "a daemon that holds the output": (
        "if os.fork() == 0:\n    os.setsid()\n    while True: print('x', flush=True)",
        ("", "too much output"),
        "",
    ),
    "zombies": ("for _ in range(3):\n    if os.fork() == 0: os._exit(0)\nprint('done')", ("",), "done"),
    "a child that ignores signals": (
        "if os.fork() == 0:\n    for s in range(1, 65):\n        try: signal.signal(s, signal.SIG_IGN)\n"
        "        except (OSError, ValueError): pass\n    while True: pass",
        ("",),
        "",
    ),
    "a sleeping shell": ("subprocess.Popen(['/bin/sh', '-c', 'sleep 1000'])", ("",), ""),
    "threads": (
        "e = threading.Event()\nfor _ in range(1000): threading.Thread(target=e.wait, daemon=True).start()",
        ("error",),
        "start new thread",
    ),
    "a thread that stays": ("threading.Thread(target=threading.Event().wait).start()", ("",), ""),
    "list bomb": ("a = [0]\nwhile True: a += a", ("out of memory",), "MemoryError"),
    "bytes of a terabyte": ("bytes(10**12)", ("out of memory",), "MemoryError"),
    "string of 10 GB": ("'a' * 10**10", ("out of memory",), "MemoryError"),
    "mmap": ("__import__('mmap').mmap(-1, 2**33)", ("error",), "Cannot allocate memory"),
    "nested lists": ("a = []\nwhile True: a = [a, [0] * 1000]", ("out of memory", "crashed"), ""),
    "range as a list": ("list(range(10**11))", ("out of memory",), "MemoryError"),
    "memory of many processes": (
        "for _ in range(20):\n    try:\n        if os.fork() == 0:\n            a = b'x' * 2**20 * 100\n"
        "            signal.pause()\n    except OSError as error:\n        print(error); break",
        ("",),
        "temporarily unavailable",
    ),
    "decompression bomb": (
        "import zlib\nd = zlib.compressobj()\nz = b''.join(d.compress(bytes(2**24)) for _ in range(80)) + d.flush()\n"
        "zlib.decompress(z)",
        ("out of memory", "timeout"),
        "",
    ),
    "power tower": ("10**10**10", ENDLESS, ""),
    "factorial": ("__import__('math').factorial(10**9)", ("timeout", "out of memory"), ""),
    "digits of a huge integer": ("print(len(str(7**3_000_000)))", ("timeout", ""), ""),
    "endless loop": ("while True: pass", ENDLESS, ""),
    "endless loop in C": ("sum(iter(int, 1))", ENDLESS, ""),
    "endless sleep": ("__import__('time').sleep(10**6)", ENDLESS, ""),
    "endless pause": ("signal.pause()", ENDLESS, ""),
    "deadlock": ("lock = threading.Lock(); lock.acquire(); lock.acquire()", ENDLESS, ""),
    "waits for itself": ("r, w = os.pipe(); os.read(r, 1)", ENDLESS, ""),
    "pattern that backtracks": ("__import__('re').match('(a+)+$', 'a' * 60 + 'b')", ENDLESS, ""),
    "catches everything": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", ENDLESS, ""),
    "blocks all signals": ("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", ENDLESS, ""),
    "handles SIGXCPU": ("signal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass", ENDLESS, ""),
    "an endless finally": ("try: 1 / 0\nfinally:\n    while True: pass", ENDLESS, ""),
    "an endless __del__": ("class A:\n    def __del__(self):\n        while True: pass\nA()", ENDLESS, ""),
    "an endless __repr__": ("class A:\n    def __repr__(self):\n        while True: pass\nprint(A())", ENDLESS, ""),
    "an endless atexit": (
        "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])\nprint('done')",
        ("", "timeout"),
        "done",
    ),
    "stops itself": ("os.kill(os.getpid(), signal.SIGSTOP)", ENDLESS, ""),
    "disk filler": ("with open('/tmp/a', 'wb') as f:\n    while True: f.write(bytes(2**20))", ("error",), "OSError"),
    "many large files": (
        "for i in range(99):\n    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(2**24))",
        ("error",),
        "No space left",
    ),
    "a sparse file": ("open('/tmp/a', 'wb').truncate(2**50)", ("error",), "File too large"),
    "many files": ("for i in range(20_000): open(f'/tmp/{i}', 'w').close()\nprint('done')", ("", "crashed"), ""),
    "deep folders": ("for i in range(5000):\n    os.mkdir('d'); os.chdir('d')", ("", "error"), ""),
    "open files": ("files = [open('/dev/null') for _ in range(10**4)]", ("error",), "Too many open files"),
    "pipes": ("pipes = [os.pipe() for _ in range(10**4)]", ("error",), "Too many open files"),
    "endless output": ("while True: print('x' * 1000)", ("too much output", "timeout"), "xxx"),
    "endless error output": ("while True: print('x' * 1000, file=sys.stderr)", ("too much output", "timeout"), "xxx"),
    "endless raw output": ("while True: os.write(1, b'x' * 65536)", ("too much output", "timeout"), "xxx"),
    "output of zeros": ("sys.stdout.buffer.write(bytes(2**20))", ("",), "\0\0"),
    "output that is no UTF-8": ("sys.stdout.buffer.write(b'\\xff\\xfe\\x00\\xd8')", ("",), "\ufffd"),
    "output of lone surrogates": ("print('\\ud800')", ("",), "\\ud800"),
    "output of escape codes": ("print('\\x1b[2J\\x1b]0;title\\x07')", ("",), "\x1b"),
    "a value of 100 MB": ("print('x' * 10**8)", ("", "too much output"), "xxx"),
    "closes its output": ("os.close(1); os.close(2); print('x')", ("", "error"), ""),
    "closes everything": ("os.closerange(0, 64)", ("error",), ""),
    "closes everything and loops": ("os.closerange(0, 64)\nwhile True: pass", ENDLESS, ""),
    "no output stream": ("sys.stdout = sys.stderr = None", ("",), ""),
    "an output stream that raises": ("class A:\n    def __getattr__(self, name): 1 / 0\nsys.stdout = A()", ("",), ""),
    "reads past the input": ("input()", ("error",), "EOFError"),
    "calls itself": ("def f(): f()\nf()", ("error",), "RecursionError"),
    "calls itself without a limit": (
        "sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        ("crashed", "out of memory", "error", "timeout"),
        "",
    ),
    "a cycle as text": ("a = []; a.append(a); print(a)", ("",), "[[...]]"),
    "reads address 0": ("ctypes.string_at(0)", ("crashed",), ""),
    "aborts": ("os.abort()", ("crashed",), ""),
    "kills itself": ("os.kill(os.getpid(), 9)", ("crashed",), ""),
    "kills all it can": ("os.kill(-1, 9)", ("", "crashed"), ""),
    "kills its parent": ("os.kill(os.getppid(), 9)\nsignal.pause()", ("crashed", "timeout"), ""),
    "kills the first process": ("try: os.kill(1, 9)\nexcept OSError: pass\nprint('lives')", ("",), "lives"),
    "stops its parent": ("os.kill(os.getppid(), signal.SIGSTOP)", ENDLESS, ""),
    "leaves at once": ("os._exit(0)", ("",), ""),
    "leaves with a number": ("os._exit(7)", ("error",), "SystemExit: 7"),
    "exits with text": ("sys.exit('no')", ("error",), "SystemExit: no"),
    "exits with an object": ("sys.exit(object())", ("error",), "SystemExit"),
    "exits well": ("print('done'); sys.exit(0)", ("",), "done"),
    "raises an interrupt": ("raise KeyboardInterrupt", ("error",), "KeyboardInterrupt"),
    "raises GeneratorExit": ("raise GeneratorExit", ("error",), "GeneratorExit"),
    "an error whose words raise": ("class E(Exception):\n    def __str__(self): raise E\nraise E", ("error",), "E"),
    "an error whose words exit": ("class E(Exception):\n    def __str__(self): os._exit(0)\nraise E", ENDS, ""),
    "an error of endless words": ("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", ENDLESS, ""),
    "an error of 10 MB": ("raise ValueError('x' * 10**7)", ("error",), "ValueError: xxx"),
    "an error of many lines": ("raise ValueError('a\\nb')", ("error",), "ValueError: a b"),
    "a chain of errors": (
        "e = None\nfor i in range(10**5):\n    n = ValueError(i); n.__cause__ = e; e = n\nraise e",
        ("error", "crashed"),
        "",
    ),
    "an error group": ("raise ExceptionGroup('g', [ValueError(1)] * 1000)", ("error",), "ExceptionGroup"),
    "replaces print": ("__builtins__.print = None\nprint(1)", ("error",), "TypeError"),
    "removes all builtins": ("__builtins__.__dict__.clear()", ("error", "crashed", ""), ""),
    "removes all modules": ("sys.modules.clear()", ENDS, ""),
    "replaces the encoder": ('import json\njson.dumps = lambda *_: \'{"kind": "done"}\'', ("", "crashed"), ""),
    "replaces os.write and os._exit": ("os.write = os._exit = lambda *_: None", ("", "crashed", "error", "timeout"), ""),
    "writes on every descriptor": (
        "for fd in range(3, 64):\n    try: os.write(fd, b'\\xff' * 100)\n    except OSError: pass",
        ("", "crashed", "error"),
        "",
    ),
    "answers for its parent": (
        'for fd in range(3, 64):\n    try: os.write(fd, b\'{"error": "", "reason": "forged"}\')\n'
        "    except OSError: pass\nos._exit(0)",
        ("", "crashed"),
        "",
    ),
    "answers with no object": (
        "for fd in range(3, 64):\n    try: os.write(fd, b'[' * 9999)\n    except OSError: pass\nos._exit(0)",
        ("", "crashed"),
        "",
    ),
    "looks through frames": (
        "f = sys._getframe()\nwhile f.f_back: f = f.f_back\nf.f_globals.clear()",
        ("", "error", "crashed"),
        "",
    ),
    "traces everything": ("sys.settrace(lambda *_: 1 / 0)\nprint(1)", ("", "error", "crashed"), ""),
    "audits everything": ("sys.addaudithook(lambda *_: 1 / 0)", ("", "error", "crashed"), ""),
    "NUL bytes": ("print(1)\0", ("error",), "null byte"),
    "lone surrogates": ("x = '\ud800'", ("error",), "surrogates"),
    "text of no language": ("\u202e\u200b\u2066", ("error",), "SyntaxError"),
    "look-alike names": ("\u0440rint(1)", ("error",), "NameError"),
    "full-width names": ("\uff50rint('x')", ("",), "x"),
    "parentheses": ("(" * 100_000, ("error", "out of memory", "crashed"), ""),
    "nested sums": ("x = " + "-" * 100_000 + "1", ("error", "out of memory", "crashed"), ""),
    "a megabyte": ("x = '" + "a" * 10**6 + "'\nprint(len(x))", ("",), "1000000"),
    "a million lines": ("pass\n" * 200_000, ("", "timeout", "out of memory"), ""),
    "an encoding of its own": ("# -*- coding: rot13 -*-\nprint(1)", ENDS, ""),
    "bad indentation": ("if 1:\nprint(1)", ("error",), "IndentationError"),
    "an empty program": ("", ("",), ""),
    "only white space": (" \t\f\n\r\n", ENDS, ""),
    "a server of its own": ("import multiprocessing\nmultiprocessing.Manager()", ("", "error", "timeout"), ""),
    "a pool of processes": ("import multiprocessing as m\nprint(m.Pool(2).map(abs, [-1]))", ("", "error", "timeout"), ""),
    "asyncio works": ("import asyncio\nasyncio.run(asyncio.sleep(0)); print('done')", ("",), "done"),
    "subprocess works": ("print(subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout)", ("",), "hi"),
    "pickle works": ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)", ("",), "A"),
    "temporary files work": ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", ("",), "3"),
}


def namespace(session) -> str:
    """Return the process namespace of a session, which is that of bwrap's child."""
    pid = session._processes.popen.pid
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    return os.readlink(f"/proc/{child}/ns/pid")


def processes_of(space: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(folder / "ns/pid") == space:
                found.append((folder / "stat").read_text())
    return found
