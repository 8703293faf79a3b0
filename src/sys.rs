//! The only `unsafe` of the program: the calls that the standard library does not offer, each behind a safe function.
//!
//! The declarations are written out by hand, since a crate for them would be a dependency. They hold for Linux where the kernel's
//! numbers are the common ones; elsewhere the program does not compile rather than misbehave.

use std::ffi::{c_int, c_long, c_short, c_uint, c_ulong, c_void};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

#[cfg(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "mips32r6",
    target_arch = "mips64r6"
))]
compile_error!("Linux on MIPS numbers signals and socket options in its own way");
#[cfg(any(target_arch = "sparc", target_arch = "sparc64"))]
compile_error!("Linux on SPARC numbers signals and poll's events in its own way");
#[cfg(not(target_os = "linux"))]
compile_error!("process groups, pipes and sockets are used here as Linux has them");

pub const SIGHUP: c_int = 1;
pub const SIGINT: c_int = 2;
pub const SIGKILL: c_int = 9;
pub const SIGTERM: c_int = 15;
pub const SIGCONT: c_int = 18;

pub const POLLIN: c_short = 0x1;
/// POLLERR and POLLHUP: nothing can be sent any more.
pub const POLLGONE: c_short = 0x18;
pub const POLLRDHUP: c_short = 0x2000;

/// EAGAIN, ENOMEM, ENFILE and EMFILE: nothing is wrong with what was asked for, but there is no room for it now.
pub const EXHAUSTED: [c_int; 4] = [11, 12, 23, 24];
/// ENOENT, ENOTDIR and ENAMETOOLONG.
pub const NOT_FOUND: [c_int; 3] = [2, 20, 36];

const SIGPIPE: c_int = 13;
const SIGURG: c_int = 23;
const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;
const SIG_SETMASK: c_int = 2;
const LAST_SIGNAL: c_int = 64;
const P_PID: c_uint = 1;
const WNOHANG: c_int = 1;
const WEXITED: c_int = 4;
const WNOWAIT: c_int = 0x0100_0000;
const O_CLOEXEC: c_int = 0o2_000_000;
const F_SETFD: c_int = 2;
const FD_CLOEXEC: c_int = 1;
const SYS_CLOSE_RANGE: c_long = 436;
const CLOSE_RANGE_CLOEXEC: c_uint = 4;
const IPPROTO_TCP: c_int = 6;
const TCP_USER_TIMEOUT: c_int = 18;
const SHUT_RDWR: c_int = 2;

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: c_short,
    revents: c_short,
}

/// At least as large and as aligned as the `siginfo_t`, `sigset_t` and `struct sigaction` of every platform above.
#[repr(C, align(16))]
struct Scratch([u8; 256]);

unsafe extern "C" {
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn waitid(idtype: c_uint, id: c_uint, info: *mut Scratch, options: c_int) -> c_int;
    fn pipe2(fds: *mut c_int, flags: c_int) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    fn shutdown(fd: c_int, how: c_int) -> c_int;
    fn setsockopt(fd: c_int, level: c_int, name: c_int, value: *const c_void, len: c_uint)
    -> c_int;
    fn signal(signal: c_int, handler: usize) -> usize;
    fn siginterrupt(signal: c_int, flag: c_int) -> c_int;
    fn sigaction(signal: c_int, new: *const Scratch, old: *mut Scratch) -> c_int;
    fn pthread_sigmask(how: c_int, new: *const Scratch, old: *mut Scratch) -> c_int;
    fn pthread_kill(thread: c_ulong, signal: c_int) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn umask(mask: c_uint) -> c_uint;
    #[cfg(target_env = "gnu")]
    fn mallopt(parameter: c_int, value: c_int) -> c_int;
}

/// Undoes what whoever started the server left behind in this process: ignored signals (SIGCHLD's would make every wait fail) and
/// blocked ones, which commands would inherit, and descriptors that commands must not see. Call it before any thread is started.
pub fn normalise_process() {
    for number in (1..=LAST_SIGNAL).filter(|&number| number != SIGPIPE) {
        let mut action = Scratch([0; 256]);
        // SAFETY: a query into a buffer that is large enough. The handler is the first member on every platform above.
        // Dispositions that std installed (SIGSEGV, SIGBUS) are not "ignore" and stay.
        unsafe {
            sigaction(number, std::ptr::null(), &mut action);
            if (&raw const action).cast::<usize>().read() == SIG_IGN {
                signal(number, SIG_DFL);
            }
        }
    }
    // SAFETY: reads a `sigset_t`, empty when all is zero, from a buffer that is larger; close_range and fcntl take numbers alone.
    unsafe {
        pthread_sigmask(SIG_SETMASK, &Scratch([0; 256]), std::ptr::null_mut());
        if syscall(
            SYS_CLOSE_RANGE,
            3 as c_uint,
            c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        ) != 0
        {
            for fd in 3..1 << 16 {
                fcntl(fd, F_SETFD, FD_CLOEXEC);
            }
        }
    }
    // A malloc arena a thread would be memory, and 64 MiB of address space, for each silent stream.
    #[cfg(target_env = "gnu")]
    // SAFETY: M_ARENA_MAX is -8; numbers alone.
    unsafe {
        mallopt(-8, 2);
    }
}

/// Takes a variable out of the environment, so that no command inherits it. Call it before any thread is started.
pub fn remove_variable(name: &str) {
    // SAFETY: there is one thread, so nobody reads the environment meanwhile.
    unsafe { std::env::remove_var(name) }
}

static LISTENING: AtomicI32 = AtomicI32::new(-1);
static SIGNALS: AtomicU32 = AtomicU32::new(0);

/// How many of SIGTERM, SIGINT and SIGHUP have come since [`catch_signals`].
pub fn signals() -> u32 {
    SIGNALS.load(Ordering::SeqCst)
}

/// Counts SIGTERM, SIGINT and SIGHUP from now on; the first one makes `accept` on the listening socket fail, for good.
/// Also lets [`interrupt`] break a blocking call.
pub fn catch_signals(listening: impl AsFd) {
    extern "C" fn count(_: c_int) {
        if SIGNALS.fetch_add(1, Ordering::SeqCst) == 0 {
            // std retries an interrupted accept, but not this. It succeeds, hence leaves the interrupted thread's errno alone.
            // SAFETY: shutdown is async-signal-safe; the listening socket stays open as long as the process.
            unsafe { shutdown(LISTENING.load(Ordering::SeqCst), SHUT_RDWR) };
        }
    }
    extern "C" fn nothing(_: c_int) {}
    LISTENING.store(listening.as_fd().as_raw_fd(), Ordering::SeqCst);
    // SAFETY: both handlers are async-signal-safe.
    unsafe {
        for number in [SIGTERM, SIGINT, SIGHUP] {
            signal(number, count as extern "C" fn(c_int) as usize);
        }
        signal(SIGURG, nothing as extern "C" fn(c_int) as usize);
        siginterrupt(SIGURG, 1);
    }
}

/// Makes the blocking call that `thread` is in fail with `EINTR`. One that it is just about to enter is not hit: call again until
/// the thread has ended. SIGURG, since it is ignored where it strikes by mistake.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // SAFETY: the handle is proof that the thread was neither joined nor detached, so its id is valid even after its end.
    unsafe { pthread_kill(thread.as_pthread_t() as c_ulong, SIGURG) };
}

/// Which of `events`, `POLLERR` and `POLLHUP` hold for `fd` now. An error counts as none of them.
pub fn ready(fd: impl AsFd, events: c_short) -> c_short {
    let mut one = PollFd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one valid entry, whose descriptor is borrowed for the call.
    if unsafe { poll(&mut one, 1, 0) } > 0 {
        one.revents
    } else {
        0
    }
}

/// Sends `signal` to every process of the group. The caller vouches that its leader was not reaped yet, so that the id cannot
/// have gone to somebody else. A group that is gone is no error.
pub fn kill_group(pgid: u32, signal: c_int) {
    // SAFETY: numbers alone. 0 and 1 would mean the server's own group and every process there is.
    unsafe {
        if pgid > 1 {
            kill(-(pgid as c_int), signal);
        }
    }
}

/// Whether the child has exited. It is not reaped: a zombie keeps its id from being given to anybody else.
pub fn exited_noreap(pid: u32) -> bool {
    let mut info = Scratch([0; 256]);
    // SAFETY: the buffer is larger than a siginfo_t, whose first member, si_signo, is 0 as long as nothing has exited.
    unsafe {
        waitid(P_PID, pid, &mut info, WEXITED | WNOHANG | WNOWAIT) == 0
            && (&raw const info).cast::<c_int>().read() != 0
    }
}

/// A pipe, as its reading and its writing end, both closed on exec.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which nobody else owns.
    unsafe {
        match pipe2(fds.as_mut_ptr(), O_CLOEXEC) {
            0 => Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Lets up to `backlog` connections wait to be accepted; std asks for 128 only.
pub fn set_backlog(listening: impl AsFd, backlog: c_int) {
    // SAFETY: numbers alone.
    unsafe { listen(listening.as_fd().as_raw_fd(), backlog) };
}

/// Declares the peer dead when what was sent stays unacknowledged for `limit` (RFC 5482). No effect on a Unix socket.
pub fn set_user_timeout(stream: &TcpStream, limit: Duration) {
    let millis = c_uint::try_from(limit.as_millis()).unwrap_or(c_uint::MAX);
    // SAFETY: the option's value is an unsigned int, read during the call.
    unsafe {
        setsockopt(
            stream.as_raw_fd(),
            IPPROTO_TCP,
            TCP_USER_TIMEOUT,
            (&raw const millis).cast(),
            size_of::<c_uint>() as c_uint,
        )
    };
}

/// Runs `create` with what it creates for the owner alone. Call it before any thread is started.
pub fn with_private_umask<T>(create: impl FnOnce() -> T) -> T {
    // SAFETY: numbers alone.
    let before = unsafe { umask(0o177) };
    let created = create();
    // SAFETY: as above.
    unsafe { umask(before) };
    created
}
