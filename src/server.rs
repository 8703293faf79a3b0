//! The accept loop, the bound on connections, and the server's end.

use crate::policy::Rules;
use crate::run::{Commands, End, Limits};
use crate::sys::{self, POLLIN};
use crate::{connection, log, pipes::TICK};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, atomic::AtomicUsize, atomic::Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{io, thread};

/// Connections that run no command. Beyond them clients wait to be accepted: nobody who sends nothing does
/// so for longer than five seconds.
const MOST_WAITING: usize = 512;
/// Of a connection's thread. Buffers are on the heap, and a 32-bit host has no 2 MiB for each of hundreds.
const STACK: usize = 128 << 10;
/// For what is out, descriptors or threads, to be had again; `accept` fails at once as long as it is not.
const PAUSE: Duration = Duration::from_millis(50);
/// What the end may take beyond `--grace`: for a command that cannot be killed to be given up, and its client
/// to be told.
const AFTER_GRACE: Duration = Duration::from_millis(2_800);
/// What the end may take once nobody waits any longer.
const AT_ONCE: Duration = Duration::from_millis(400);
/// Signals within this time are one: `killall` reaches the server by itself and through the supervisor.
const SAME_SIGNAL: Duration = Duration::from_millis(200);
/// Between two looks at what has ended.
const END_TICK: Duration = Duration::from_millis(5);

struct Server {
    rules: Rules,
    commands: Commands,
    /// Connections that are being served.
    connections: AtomicUsize,
}

/// One of the connections that are being served, until it is dropped.
struct Counted(Arc<Server>);

/// Serves until a signal ends the server, and every command has ended.
pub fn serve(listener: TcpListener, rules: Rules, limits: Limits) -> io::Result<()> {
    // std's `accept` would go on after a signal, so it is not what waits.
    listener.set_nonblocking(true)?;
    let server = Arc::new(Server {
        rules,
        commands: Commands::new(limits),
        connections: AtomicUsize::new(0),
    });
    while sys::terminations() + sys::hangups() == 0 {
        if server.is_full() {
            thread::sleep(PAUSE);
            continue;
        }
        if sys::poll_one(&listener, POLLIN, TICK) == 0 {
            continue;
        }
        match listener.accept() {
            Ok((socket, peer)) => start_thread(&server, socket, peer),
            Err(error) if is_the_client_s(error.kind()) => {}
            Err(_) => thread::sleep(PAUSE),
        }
    }
    drop(listener);
    log::line(format_args!("shutdown"));
    server.end();
    Ok(())
}

/// Whether `accept` failed for reasons that lie with one client, or with a signal.
fn is_the_client_s(kind: ErrorKind) -> bool {
    use ErrorKind::*;
    matches!(kind, WouldBlock | Interrupted | ConnectionAborted | ConnectionReset)
}

/// Serves a client in a thread of its own. Where none is to be had, the client waits for one, and with it all
/// who come later: whatever ends gives one back.
fn start_thread(server: &Arc<Server>, socket: TcpStream, peer: SocketAddr) {
    // Shared with the thread, so that it is still there where the thread could not be started.
    let socket = Arc::new(socket);
    while sys::terminations() + sys::hangups() == 0 {
        let counted = Counted::new(server);
        let own = socket.clone();
        let serve = move || {
            let server = &counted.0;
            connection::serve(&own, peer, &server.rules, &server.commands);
        };
        // `thread::spawn` would panic.
        if thread::Builder::new().stack_size(STACK).spawn(serve).is_ok() {
            return;
        }
        thread::sleep(PAUSE);
    }
}

impl Server {
    fn is_full(&self) -> bool {
        let connections = self.connections.load(SeqCst);
        connections.saturating_sub(self.commands.running()) >= MOST_WAITING
    }

    /// Ends all commands, and waits for all connections: they end by themselves, after their commands.
    fn end(&self) {
        self.commands.end(End::Asked);
        let mut deadline = Instant::now() + self.commands.limits.grace + AFTER_GRACE;
        // SIGTERM and SIGINT that count as the first one, and when that came.
        let mut first = 0;
        let mut first_seen = None;
        while self.connections.load(SeqCst) > 0 && Instant::now() < deadline {
            let terminations = sys::terminations();
            if terminations > 0 {
                let seen = *first_seen.get_or_insert_with(Instant::now);
                if seen.elapsed() < SAME_SIGNAL {
                    first = terminations;
                } else if terminations > first && !self.commands.is_ending(End::AtOnce) {
                    self.commands.end(End::AtOnce);
                    deadline = deadline.min(Instant::now() + AT_ONCE);
                }
            }
            thread::sleep(END_TICK);
        }
    }
}

impl Counted {
    fn new(server: &Arc<Server>) -> Counted {
        server.connections.fetch_add(1, SeqCst);
        Counted(server.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, SeqCst);
    }
}
