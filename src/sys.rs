//! The only `unsafe` of the program: the system calls that the standard library does not offer,
//! each behind a safe function.
//!
//! They are declared by hand, since a crate for them would be a dependency. Numbers have the names
//! of their man pages, and hold for Linux; where it has other ones, on MIPS and SPARC, the program
//! does not compile rather than misbehave. "Numbers alone" in a SAFETY comment: the call gets no
//! pointer, and so touches no memory.

use std::ffi::{c_int, c_short, c_uint, c_ulong};
use std::os::{fd::AsFd, fd::AsRawFd, unix::process::ExitStatusExt, unix::process::parent_id};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};
use std::{io, net::TcpStream, process, ptr, time::Duration};

#[cfg(any(target_arch = "mips", target_arch = "mips64", target_arch = "mips32r6"))]
compile_error!("Linux on MIPS has other numbers for signals and socket options");
#[cfg(any(target_arch = "mips64r6", target_arch = "sparc", target_arch = "sparc64"))]
compile_error!("Linux on MIPS and SPARC has other numbers for signals and poll's events");

// signal(7)
const SIGHUP: c_int = 1;
const SIGINT: c_int = 2;
pub const SIGKILL: c_int = 9;
pub const SIGTERM: c_int = 15;
const SIGCHLD: c_int = 17;
pub const SIGCONT: c_int = 18;
pub const SIGSTOP: c_int = 19;
const SIGXFSZ: c_int = 25;
const SIG_IGN: usize = 1;
const SIG_SETMASK: c_int = 2;

// errno(3), as `io::Error::raw_os_error` has it
pub const ENFILE: Option<i32> = Some(23);
pub const EMFILE: Option<i32> = Some(24);
pub const ENAMETOOLONG: Option<i32> = Some(36);

// poll(2)
pub const POLLIN: c_short = 0x1;
pub const POLLOUT: c_short = 0x4;
pub const POLLERR: c_short = 0x8;
pub const POLLHUP: c_short = 0x10;
pub const POLLRDHUP: c_short = 0x2000;

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: c_short,
    revents: c_short,
}

/// `siginfo_t`, 128 bytes, as ints (sigaction(2)): si_signo, si_errno, si_code, on 64 bits a gap
/// that aligns what follows to a pointer, and for a child then si_pid.
#[repr(C, align(8))]
struct SignalInfo([c_int; 32]);
const SI_PID: usize = if cfg!(target_pointer_width = "64") { 4 } else { 3 };

unsafe extern "C" {
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn fork() -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    fn setsid() -> c_int;
    fn setsockopt(fd: c_int, level: c_int, name: c_int, val: *const c_int, len: c_uint) -> c_int;
    fn signal(signal: c_int, handler: Option<extern "C" fn(c_int)>) -> usize;
    fn sigprocmask(how: c_int, set: *const [c_ulong; 32], old: *mut [c_ulong; 32]) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn waitid(idtype: c_uint, id: c_uint, info: *mut SignalInfo, options: c_int) -> c_int;
}

/// How many signals have come that end the server. Of SIGHUP only the first counts, since a
/// terminal that closes sends several.
pub static SIGNALS: AtomicU32 = AtomicU32::new(0);
/// In the supervisor the server's process id, else 0.
static SERVER: AtomicI32 = AtomicI32::new(0);

/// Notes a signal, and hands it on to the server: atomics and kill(2) alone.
extern "C" fn note(number: c_int) {
    if number != SIGHUP || !is_ending() {
        SIGNALS.fetch_add(1, SeqCst);
    }
    let server = SERVER.load(SeqCst);
    if server > 0 {
        // SAFETY: numbers alone. To reap the server is the supervisor's last act, so until then the
        // number is the server's.
        unsafe { kill(server, number) };
    }
}

extern "C" fn do_nothing(_: c_int) {}

/// Whether a signal has come that ends the server; SIGHUP, too, unless `nohup` keeps it away.
pub fn is_ending() -> bool {
    SIGNALS.load(SeqCst) > 0
}

/// Splits the process in two. The parent gets the child's process id, and hands SIGTERM, SIGINT and
/// SIGHUP on to it. The child gets `None`: it leads a session of its own, without a controlling
/// terminal, and the kernel sends it SIGTERM when the parent ends.
pub fn fork_server() -> io::Result<Option<u32>> {
    const PR_SET_PDEATHSIG: c_int = 1;
    let parent = process::id();
    // Signals wait until SERVER is stored: one that came between fork and that would not be handed
    // on.
    block_signals(c_ulong::MAX);
    // SAFETY: the handlers do only what signal-safety(7) admits.
    unsafe {
        // Handlers rather than ignored signals, also where nothing is to happen: a command gets the
        // default for what is handled here, but would inherit what is ignored.
        signal(SIGTERM, Some(note));
        signal(SIGINT, Some(note));
        // Ignored at the start, as nohup(1) has it, it stays without effect.
        if signal(SIGHUP, Some(note)) == SIG_IGN {
            signal(SIGHUP, Some(do_nothing));
        }
        // A log file that meets RLIMIT_FSIZE is an error of that write, and not the end.
        signal(SIGXFSZ, Some(do_nothing));
        // The default, which is a null handler: whoever starts this may ignore it, and every wait
        // for a child would fail.
        signal(SIGCHLD, None);
    }
    // SAFETY: called once, by `supervisor`, before there is any thread, so the child finds no lock
    // held.
    let pid = check(unsafe { fork() })?;
    SERVER.store(pid, SeqCst);
    block_signals(0);
    if pid > 0 {
        return Ok(Some(pid as u32));
    }
    // SAFETY: numbers alone; prctl's second argument is an unsigned long
    // (PR_SET_PDEATHSIG(2const)).
    unsafe {
        setsid();
        prctl(PR_SET_PDEATHSIG, SIGTERM as c_ulong);
    }
    if parent_id() != parent {
        // It had ended before that was asked for.
        note(SIGTERM);
    }
    Ok(None)
}

/// Blocks the signals whose bits are set, and no others: all for all ones. Commands inherit what is
/// blocked.
fn block_signals(bits: c_ulong) {
    // SAFETY: the array is at least as large as a `sigset_t`.
    unsafe { sigprocmask(SIG_SETMASK, &[bits; 32], ptr::null_mut()) };
}

/// Sends `signal` to one process. Returns false where it is gone, or may not be signalled.
pub fn send(pid: u32, signal: c_int) -> bool {
    // SAFETY: numbers alone. A process id is above 0, so this is never a group.
    unsafe { kill(pid as c_int, signal) == 0 }
}

/// Sends `signal` to every process of the group whose leader is `leader`, as far as they may be
/// signalled. The caller vouches that the leader was not reaped, so that the number cannot be
/// somebody else's.
pub fn send_group(leader: u32, signal: c_int) {
    // SAFETY: numbers alone. A child's id is above 1, so this is never every process there is.
    unsafe { kill(-(leader as c_int), signal) };
}

// waitid(2)
const P_ALL: c_uint = 0;
const P_PID: c_uint = 1;
const WNOHANG: c_int = 1;
const WEXITED: c_int = 4;
const WNOWAIT: c_int = 0x0100_0000;

/// Waits until any child has exited, and returns its id. It is not reaped: a zombie keeps its
/// number from being given to another process.
pub fn wait_noreap() -> io::Result<u32> {
    let mut info = SignalInfo([0; 32]);
    // SAFETY: the call fills in a siginfo_t, for which there is room.
    check(unsafe { waitid(P_ALL, 0, &mut info, WEXITED | WNOWAIT) })?;
    Ok(info.0[SI_PID] as u32)
}

/// Whether that child has exited, or is not there. It is not reaped.
pub fn has_exited(pid: u32) -> bool {
    let mut info = SignalInfo([0; 32]);
    // SAFETY: as above.
    let returned = unsafe { waitid(P_PID, pid, &mut info, WEXITED | WNOWAIT | WNOHANG) };
    // For a child that still runs nothing is filled in. What fails would go on failing, and is not
    // waited for.
    returned == -1 || info.0[SI_PID] > 0
}

/// Reaps that child, once it has exited. Returns its exit status as a shell has it: 128 + N where
/// signal N ended it (XCU 2.8.2).
pub fn reap(pid: u32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: the call fills in an int.
    check(unsafe { waitpid(pid as c_int, &mut status, 0) })?;
    let status = process::ExitStatus::from_raw(status);
    Ok(status.code().unwrap_or(128 + status.signal().unwrap_or(0)))
}

/// What a call has returned, or the error that -1 stands for. EINTR is none of them: signal(3) sets
/// handlers with SA_RESTART, so that a wait goes on after one.
fn check(returned: c_int) -> io::Result<c_int> {
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

/// Waits up to `wait` until one of `events`, POLLERR or POLLHUP holds for the descriptor; returns
/// those that do. A signal ends the wait early, with none.
pub fn poll_one(descriptor: &impl AsFd, events: c_short, wait: Duration) -> c_short {
    let fd = descriptor.as_fd().as_raw_fd();
    let mut entry = PollFd { fd, events, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { poll(&mut entry, 1, wait.as_millis() as c_int) };
    entry.revents
}

/// Makes reading and writing return at once where they would wait. For a pipe's end of our own,
/// which has no other flag; what a command holds is another open file description, and stays as it
/// is.
pub fn set_nonblocking(pipe: &impl AsFd) {
    const F_SETFL: c_int = 4;
    const O_NONBLOCK: c_int = 0o4000;
    // SAFETY: numbers alone, and a descriptor that is open as long as it is borrowed.
    unsafe { fcntl(pipe.as_fd().as_raw_fd(), F_SETFL, O_NONBLOCK) };
}

/// Has TCP find out that a peer is gone without a word: it is probed after `idle` without any
/// traffic, and counts as dead when it has acknowledged nothing for `patience`, neither a probe nor
/// what was sent. TCP keeps whole seconds here, so they are rounded up.
pub fn notice_dead_peer(socket: &TcpStream, idle: Duration, patience: Duration) {
    // socket(7) and tcp(7)
    const SOL_SOCKET: c_int = 1;
    const SO_KEEPALIVE: c_int = 9;
    const IPPROTO_TCP: c_int = 6;
    const TCP_KEEPIDLE: c_int = 4;
    const TCP_KEEPINTVL: c_int = 5;
    const TCP_USER_TIMEOUT: c_int = 18;
    let set = |level: c_int, name: c_int, value: c_int| {
        // SAFETY: the option's value is an int, 4 bytes, read during the call.
        unsafe { setsockopt(socket.as_raw_fd(), level, name, &value, 4) };
    };
    // The kernel takes no more.
    let seconds = |time: Duration| time.as_secs_f64().ceil().min(32_767.0) as c_int;
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
    set(IPPROTO_TCP, TCP_KEEPIDLE, seconds(idle));
    // With TCP_USER_TIMEOUT no number of probes is looked at: the first one comes after `idle`, and
    // the next, when `patience` is over, finds the peer dead.
    set(IPPROTO_TCP, TCP_KEEPINTVL, seconds(patience));
    // `as` stops at the largest int, 24 days.
    let millis = (patience.as_secs_f64() * 1000.0).ceil() as c_int;
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, millis);
}
