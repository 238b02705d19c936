"""A seccomp filter in classic BPF: which system calls the process may no longer make.

Built here rather than by libseccomp, so that nothing has to be installed. It allows by default:
TensorFlow and Python use too many calls, and new ones with every release, for a list of what is
allowed. What it denies is what reaches other processes, the network, the kernel's own interfaces,
or files past Landlock (which leaves modes, owners and times of files alone).
Format: https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html
"""

import ctypes
import errno
import os
import platform
import signal
import socket
import stat
import struct

# asm/unistd_64.h and asm-generic/unistd.h: (x86-64, aarch64); None where there is none.
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "accept": (43, 202), "accept4": (288, 242), "acct": (163, 89), "add_key": (248, 217),
    "adjtimex": (159, 171), "bind": (49, 200), "bpf": (321, 280), "chmod": (90, None),
    "chown": (92, None), "chroot": (161, 51), "clock_adjtime": (305, 266),
    "clock_settime": (227, 112), "clone": (56, 220), "clone3": (435, 435), "connect": (42, 203),
    "delete_module": (176, 106), "execve": (59, 221), "execveat": (322, 281),
    "fanotify_init": (300, 262), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "fchown": (93, 55), "fchownat": (260, 54), "fcntl": (72, 25),
    "finit_module": (313, 273), "fork": (57, None), "fremovexattr": (199, 16),
    "fsconfig": (431, 431), "fsetxattr": (190, 7), "fsmount": (432, 432), "fsopen": (430, 430),
    "fspick": (433, 433), "futimesat": (261, None), "init_module": (175, 105),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioctl": (16, 29),
    "ioperm": (173, None), "iopl": (172, None), "ioprio_set": (251, 30), "kcmp": (312, 272),
    "kexec_file_load": (320, 294), "kexec_load": (246, 104), "keyctl": (250, 219),
    "kill": (62, 129), "lchown": (94, None), "listen": (50, 201), "lremovexattr": (198, 15),
    "lsetxattr": (189, 6), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "migrate_pages": (256, 238), "mkdir": (83, None), "mkdirat": (258, 34),
    "mknod": (133, None), "mknodat": (259, 33),
    "modify_ldt": (154, None), "mount": (165, 40), "mount_setattr": (442, 442),
    "move_mount": (429, 429), "move_pages": (279, 239), "mq_open": (240, 180),
    "msgget": (68, 186), "name_to_handle_at": (303, 264), "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "perf_event_open": (298, 241),
    "personality": (135, 92), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pivot_root": (155, 41), "prctl": (157, 167),
    "prlimit64": (302, 261), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "reboot": (169, 142),
    "removexattr": (197, 14), "request_key": (249, 218), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "sched_setattr": (314, 274), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "semget": (64, 190), "setdomainname": (171, 162),
    "sethostname": (170, 161), "setns": (308, 268), "setpriority": (141, 140),
    "settimeofday": (164, 170), "setxattr": (188, 5), "shmat": (30, 196), "shmget": (29, 194),
    "socket": (41, 198), "socketpair": (53, 199), "swapoff": (168, 225), "swapon": (167, 224),
    "syslog": (103, 116), "tgkill": (234, 131), "tkill": (200, 130), "truncate": (76, 45),
    "umask": (95, 166), "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282),
    "utime": (132, None), "utimensat": (280, 88), "utimes": (235, None), "vfork": (58, None),
    "vhangup": (153, 58),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # linux/audit.h
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_X32_BIT = 0x40000000

# What depends on what the process is allowed; all else of _NUMBERS is denied always.
_EXECUTION = ("execve", "execveat", "fork", "vfork")
_CONNECTION = ("socket", "connect", "bind", "socketpair")
_BY_ARGUMENT = ("clone", "clone3", "fcntl", "ioctl", "kill", "prctl", "prlimit64", "setpriority",
                "tgkill")  # fmt: skip

_CLONE_THREAD = 0x00010000
_CLONE_NEW_ANYTHING = 0x7E020080  # namespaces
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_PR_SET_PDEATHSIG = 1
_OWNER = (stat.S_IRUSR, stat.S_IWUSR, stat.S_IXUSR)

# linux/bpf_common.h and linux/seccomp.h
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE = 0, 4
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1

Program = list[tuple[int, int, int, int]]


def _return(value: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, value)


_DENY = _return(_ERRNO | errno.EPERM)


def _argument(place: int) -> tuple[int, int, int, int]:
    """Loads the low half of an argument: both architectures are little-endian."""
    return (_LOAD, 0, 0, 16 + 8 * place)


def _if_number(number: int, body: Program) -> Program:
    return [(_JUMP_EQUAL, 0, len(body), number), *body]


def _only(place: int, *values: int) -> Program:
    """Deny unless the argument is one of the values."""
    tests: Program = []
    for value in values:
        tests += [(_JUMP_EQUAL, 0, 1, value & 0xFFFFFFFF), _return(_ALLOW)]
    return [_argument(place), *tests, _DENY]


def _never(place: int, *values: int) -> Program:
    """Deny where the argument is one of the values."""
    tests: Program = []
    for value in values:
        tests += [(_JUMP_EQUAL, 0, 1, value & 0xFFFFFFFF), _DENY]
    return [_argument(place), *tests, _return(_ALLOW)]


def _with(place: int, bits: tuple[int, ...]) -> Program:
    """Deny unless all the bits are set in the argument."""
    tests: Program = []
    for bit in bits:
        tests += [(_JUMP_SET, 1, 0, bit), _DENY]
    return [_argument(place), *tests, _return(_ALLOW)]


def _without(place: int, bits: int) -> Program:
    """Deny where any of the bits is set in the argument."""
    return [_argument(place), (_JUMP_SET, 0, 1, bits), _DENY, _return(_ALLOW)]


def program(machine: str, pid: int, *, tools: bool, network: bool) -> Program:
    """The filter for a process `pid` on a machine ("x86_64" or "aarch64").

    `tools`: it may start processes, and signal them. `network`: it may open connections.
    """
    column, architecture = _ARCHITECTURES[machine]
    own: dict[str, Program] = {
        # Another architecture's numbers, or its bodies' arguments, would be read wrongly.
        "clone3": [_return(_ERRNO | errno.ENOSYS)],  # its flags lie in memory; libc then uses clone
        "clone": [
            _argument(0),
            (_JUMP_SET, 0, 1, _CLONE_NEW_ANYTHING),
            _DENY,
            *([] if tools else [(_JUMP_SET, 1, 0, _CLONE_THREAD), _DENY]),
            _return(_ALLOW),
        ],
        "fcntl": _never(1, _F_SETOWN, _F_SETSIG, _F_SETOWN_EX),
        "ioctl": _never(1, _TIOCSTI, _TIOCLINUX),
        "prlimit64": _only(0, 0, pid),
        "setpriority": _only(1, 0, pid),
        # Folders that its worker could not look into could be filled without end.
        "mkdir": _with(1, _OWNER),
        "mkdirat": _with(2, _OWNER),
        "umask": _without(0, sum(_OWNER)),
        # It must go on dying with its worker.
        "prctl": [
            _argument(0),
            (_JUMP_EQUAL, 1, 0, _PR_SET_PDEATHSIG),
            _return(_ALLOW),
            *_only(1, signal.SIGKILL),
        ],
    }
    if not tools:
        own |= {"kill": _only(0, pid), "tgkill": _only(0, pid)}
    if network:
        families = (socket.AF_INET, socket.AF_INET6, getattr(socket, "AF_NETLINK", 16))
        own["socket"] = _only(0, *families)
    free = {*_BY_ARGUMENT, *(_EXECUTION if tools else ()), *(_CONNECTION if network else ())}
    built: Program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        _return(_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        built += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), _DENY]
    for name, numbers in _NUMBERS.items():
        number = numbers[column]
        if number is None or (name in free and name not in own):
            continue
        built += _if_number(number, own.get(name, [_DENY]))
    return [*built, _return(_ALLOW)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(*, tools: bool, network: bool) -> None:
    """Filter the system calls of this process, all its threads, and all that it starts.

    Needs no_new_privs. Raises OSError where the kernel or the machine has no such filters.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES or not hasattr(ctypes, "CDLL") or os.name != "posix":
        raise OSError(errno.ENOSYS, f"no filter is known for {machine}")
    packed = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in program(machine, os.getpid(), tools=tools, network=network)
    )
    buffer = ctypes.create_string_buffer(packed, len(packed))
    told = _Program(len(packed) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    # To every thread at once: those that the libraries started before would stay free.
    done = libc.syscall(_SECCOMP[machine], _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(told))
    if done != 0:
        number = ctypes.get_errno()
        reason = os.strerror(number) if done < 0 else f"thread {done} has filters of its own"
        raise OSError(number, f"seccomp: {reason}")
