//! The only `unsafe` of the program: the calls that the standard library does not offer, each behind a safe function.
//!
//! The declarations are written out by hand, since a crate for them would be a dependency. They hold for Linux where the kernel's
//! numbers are the common ones; elsewhere the program does not compile rather than misbehave.

use std::ffi::{c_int, c_long, c_short, c_uint, c_ulong, c_void};
use std::net::{TcpListener, TcpStream};
use std::os::unix::{net::UnixStream, prelude::*};
use std::sync::{OnceLock, atomic::AtomicU32, atomic::Ordering::SeqCst};
use std::{io, io::Read, ptr, time::Duration};

#[cfg(not(target_os = "linux"))]
compile_error!("process groups, pipes and sockets are used here as Linux has them");
#[cfg(any(target_arch = "mips", target_arch = "mips64"))]
compile_error!("Linux on MIPS numbers signals and socket options in its own way");
#[cfg(any(target_arch = "mips32r6", target_arch = "mips64r6"))]
compile_error!("Linux on MIPS numbers signals and socket options in its own way");
#[cfg(any(target_arch = "sparc", target_arch = "sparc64"))]
compile_error!("Linux on SPARC numbers signals and poll's events in its own way");

pub const SIGKILL: c_int = 9;
pub const SIGTERM: c_int = 15;
pub const SIGCONT: c_int = 18;
const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;

pub const POLLIN: c_short = 0x1;
pub const POLLOUT: c_short = 0x4;
pub const POLLRDHUP: c_short = 0x2000;
/// POLLERR and POLLHUP: nothing can be sent any more.
pub const POLLGONE: c_short = 0x18;

/// SOCK_CLOEXEC and SOCK_NONBLOCK.
const CLOEXEC_NONBLOCK: c_int = 0o2_004_000;

/// EAGAIN, ENOMEM, ENFILE and EMFILE: nothing is wrong with what was asked for, but there is no room for it now.
pub const EXHAUSTED: [c_int; 4] = [11, 12, 23, 24];
/// ENOENT, ENOTDIR and ENAMETOOLONG.
pub const NOT_FOUND: [c_int; 3] = [2, 20, 36];

#[repr(C)]
struct PollFd(c_int, c_short, c_short);

/// At least as large and as aligned as the `siginfo_t` and the `sigset_t` of every platform.
#[repr(C, align(16))]
struct Scratch([c_int; 64]);

unsafe extern "C" {
    fn _exit(status: c_int) -> !;
    fn accept4(fd: c_int, address: *mut c_void, length: *mut c_uint, flags: c_int) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn fork() -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    #[cfg(target_env = "gnu")]
    fn mallopt(parameter: c_int, value: c_int) -> c_int;
    // musl's offset has 64 bits everywhere, glibc's only under this name.
    #[cfg_attr(target_env = "gnu", link_name = "mmap64")]
    fn mmap(at: *mut c_void, n: usize, p: c_int, f: c_int, fd: c_int, o: i64) -> *mut c_void;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn pthread_sigmask(how: c_int, new: *const Scratch, old: *mut Scratch) -> c_int;
    fn setsid() -> c_int;
    fn setsockopt(fd: c_int, level: c_int, name: c_int, new: *const c_uint, n: c_uint) -> c_int;
    fn signal(signal: c_int, handler: usize) -> usize;
    fn syscall(number: c_long, ...) -> c_long;
    fn umask(mask: c_uint) -> c_uint;
    fn waitid(idtype: c_uint, id: c_uint, info: *mut Scratch, options: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
}

/// Runs before std's start, which then finds SIGBUS and SIGSEGV taken and leaves out its report of stack overflows: an extra stack
/// for each thread, mapped, protected and unmapped again, 5 to 10 % of what a short run costs. An overflow still ends at the guard
/// page. [`normalise_process`] sets them to default.
#[used]
#[unsafe(link_section = ".init_array")]
static TAKE_FAULT_SIGNALS: extern "C" fn() = {
    extern "C" fn take() {
        // SAFETY: numbers alone; there is one thread.
        let _ = [7, 11].map(|number| unsafe { signal(number, SIG_IGN) });
    }
    take
};

/// Undoes what whoever started the server left behind in this process: ignored signals (SIGCHLD's would make every wait fail) and
/// blocked ones, which commands would inherit; descriptors and the variable `secret`, which they must not see.
/// Call it before any thread is started.
pub fn normalise_process(secret: &str) {
    const SIG_SETMASK: c_int = 2;
    const CLOSE_RANGE: c_long = 436;
    const CLOSE_RANGE_CLOEXEC: c_uint = 4;
    // SAFETY: numbers, and a `sigset_t`, empty where all is zero. There is one thread, and nobody else reads the environment.
    unsafe {
        // All but SIGPIPE, which std ignores, and resets in commands.
        for number in (1..13).chain(14..65) {
            signal(number, SIG_DFL);
        }
        pthread_sigmask(SIG_SETMASK, &Scratch([0; 64]), ptr::null_mut());
        // Kernels before 5.11 do not know the call, or not its flag. 2 and 1 are F_SETFD and FD_CLOEXEC.
        if syscall(CLOSE_RANGE, 3 as c_uint, c_uint::MAX, CLOSE_RANGE_CLOEXEC) != 0 {
            (3..1 << 16).for_each(|fd| _ = fcntl(fd, 2, 1 as c_int));
        }
        std::env::remove_var(secret);
        // M_ARENA_MAX: an arena for each thread would be memory, and 64 MiB of addresses, for each silent stream.
        #[cfg(target_env = "gnu")]
        mallopt(-8, 2);
        // M_MMAP_THRESHOLD: glibc raises it where a large piece is freed, and then gives less memory back.
        #[cfg(target_env = "gnu")]
        mallopt(-3, 128 << 10);
    }
}

/// The ids of groups that must not outlive this process, in memory that the guardian sees too; 0 is a free place.
static GUARDED: OnceLock<&[AtomicU32]> = OnceLock::new();
const PLACES: usize = 1 << 16;

/// Starts the guardian: a process that waits for the end of this one, however it comes (SIGKILL, out of memory), and then kills the
/// groups that are still guarded. Call it before any thread is started.
///
/// It is forked, so that guarding is a store to memory and no system call; twice, so that it is no child of this process; and leaves
/// the session, so that no terminal ends it.
pub fn start_guardian() -> io::Result<()> {
    let (end, mut other_end) = UnixStream::pair()?;
    // SAFETY: new memory, zeroed, aligned to a page, of that size and never unmapped. There is one thread, so a fork may do anything.
    unsafe {
        // PROT_READ and PROT_WRITE, MAP_SHARED and MAP_ANONYMOUS.
        let at = mmap(ptr::null_mut(), PLACES * 4, 3, 0x21, -1, 0);
        let child = if at as isize == -1 { -1 } else { fork() };
        if child == -1 {
            return Err(io::Error::last_os_error());
        }
        let groups = GUARDED.get_or_init(|| std::slice::from_raw_parts(at.cast(), PLACES));
        if child > 0 {
            waitpid(child, ptr::null_mut(), 0);
            // Open until this process ends.
            std::mem::forget(end);
            return Ok(());
        }
        if fork() == 0 {
            setsid();
            // Who kills the server by its name is not to hit this too.
            let _ = std::fs::write("/proc/self/comm", "sse-guardian");
            drop(end);
            let _ = other_end.read(&mut [0]);
            let guarded = groups.iter().map(|place| place.load(SeqCst));
            let left = guarded.filter(|&pgid| pgid > 1);
            left.for_each(|pgid| kill_group(pgid, SIGKILL));
        }
        _exit(0)
    }
}

/// Has a group killed if this process ends before the place is set to 0 again, as it must be before the leader is reaped.
pub fn guard(pgid: u32) -> Option<&'static AtomicU32> {
    let take = |place: &&AtomicU32| place.compare_exchange(0, pgid, SeqCst, SeqCst).is_ok();
    GUARDED.get()?.iter().find(take)
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

/// How many of SIGTERM, SIGINT and SIGHUP have come since [`count_signals`].
pub fn signals() -> u32 {
    SIGNALS.load(SeqCst)
}

/// Counts SIGHUP, SIGINT and SIGTERM from now on.
pub fn count_signals() {
    extern "C" fn count(_: c_int) {
        SIGNALS.fetch_add(1, SeqCst);
    }
    let count = count as extern "C" fn(c_int) as usize;
    // SAFETY: the handler is async-signal-safe.
    let _ = [1, 2, 15].map(|number| unsafe { signal(number, count) });
}

/// Which of the events, `POLLERR` and `POLLHUP` hold for each descriptor, waiting up to `wait` for one of them. Where it is negative, or
/// nothing is asked of it, nothing holds. A signal ends the wait; an error counts as none.
pub fn poll_all<const N: usize>(asked: [(RawFd, c_short); N], wait: Duration) -> [c_short; N] {
    let mut fds = asked.map(|(fd, events)| PollFd(if events == 0 { -1 } else { fd }, events, 0));
    // SAFETY: as many valid entries.
    unsafe { poll(fds.as_mut_ptr(), N as c_ulong, wait.as_millis() as c_int) };
    fds.map(|entry| entry.2)
}

/// The same for one descriptor.
pub fn ready(fd: &impl AsRawFd, events: c_short, wait: Duration) -> c_short {
    poll_all([(fd.as_raw_fd(), events)], wait)[0]
}

/// Sends `signal` to every process of the group. The caller vouches that its leader was not reaped yet, so that the id cannot
/// have gone to somebody else. A group that is gone is no error.
pub fn kill_group(pgid: u32, signal: c_int) {
    // SAFETY: numbers alone. A child's id is above 1, so this is never every process there is.
    unsafe { kill(-(pgid as c_int), signal) };
}

/// Whether the child has exited. It is not reaped: a zombie keeps its id from being given to anybody else.
pub fn exited_noreap(pid: u32) -> bool {
    const P_PID: c_uint = 1;
    const WNOHANG_WEXITED_WNOWAIT: c_int = 1 | 4 | 0x0100_0000;
    let mut info = Scratch([0; 64]);
    // SAFETY: the buffer is larger than a siginfo_t. Its first member, si_signo, is 0 as long as nothing has exited.
    unsafe { waitid(P_PID, pid, &mut info, WNOHANG_WEXITED_WNOWAIT) == 0 && info.0[0] != 0 }
}

/// The next connection of a listening socket of any family, not blocking; std asks for the address that its own has.
pub fn accept(listening: &TcpListener) -> io::Result<TcpStream> {
    let fd = listening.as_raw_fd();
    // SAFETY: no address is asked for; the descriptor is new and nobody else's.
    match unsafe { accept4(fd, ptr::null_mut(), ptr::null_mut(), CLOEXEC_NONBLOCK) } {
        -1 => Err(io::Error::last_os_error()),
        fd => Ok(unsafe { TcpStream::from_raw_fd(fd) }),
    }
}

/// Lets up to `backlog` connections wait to be accepted, where std asks for 128, and sets what they inherit, where they are TCP: what is
/// written is sent at once; and the peer counts as dead when it acknowledges nothing for `stall`, neither what was sent (RFC 5482),
/// nor the probes that begin after `idle` without any traffic, of which TCP has only whole seconds.
pub fn set_options(socket: &TcpListener, backlog: c_int, idle: Duration, stall: Duration) {
    let seconds = idle.as_secs().clamp(1, 32_767) as c_uint;
    let millis = stall.as_millis().min(c_int::MAX as u128) as c_uint;
    // SO_KEEPALIVE of SOL_SOCKET; TCP_NODELAY, TCP_KEEPIDLE, TCP_KEEPINTVL and TCP_USER_TIMEOUT of IPPROTO_TCP.
    let tcp = [(1, 1), (4, seconds), (5, seconds), (18, millis)];
    let tcp = tcp.map(|(name, value)| (6, name, value));
    // SAFETY: numbers alone; each option's value is an int, 4 bytes, read during the call.
    unsafe {
        listen(socket.as_raw_fd(), backlog);
        for (level, name, value) in [(1, 9, 1)].into_iter().chain(tcp) {
            setsockopt(socket.as_raw_fd(), level, name, &value, 4);
        }
    }
}

/// Sets which permissions new files are without, and returns what it was before. Call it before any thread is started.
pub fn set_umask(mask: u32) -> u32 {
    // SAFETY: numbers alone.
    unsafe { umask(mask) }
}
