//! The accept loop, the bound on connections, and the server's end.

use crate::run::{Client, IS_URGENT, RUNNING};
use crate::{config::Config, connection, log, pipes::TICK, sys};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, atomic::Ordering::SeqCst};
use std::{io, thread, time::Duration, time::Instant};

/// Connections that run no command. Beyond them clients wait to be accepted until one of these
/// ends: after five seconds, where it sends nothing.
const MOST_WAITING: usize = 512;
/// Of a connection's thread. Buffers are on the heap, and a 32-bit host has no 2 MiB for each of
/// hundreds.
const STACK: usize = 128 << 10;
/// Between two looks at what nothing tells of: whether descriptors and threads can be had again, or
/// how the end goes on.
const PAUSE: Duration = Duration::from_millis(10);
/// What the end may take beyond `--grace`: 1 s until a command that cannot be killed is given up,
/// 0.5 s until its readers notice that, 0.7 s for a client that does not read, and some more for a
/// slow host.
const AFTER_GRACE: Duration = Duration::from_millis(2_800);
/// What the end may take after a second signal.
const URGENT_TIME: Duration = Duration::from_millis(300);
/// Signals within this time are one: `killall` reaches the server by itself and through the
/// supervisor.
const SAME_SIGNAL: Duration = Duration::from_millis(200);

/// Serves until a signal ends the server, and every command has ended.
pub fn serve(listener: TcpListener, config: Config) -> io::Result<()> {
    // std's `accept` would go on after a signal, so it is not what waits.
    listener.set_nonblocking(true)?;
    let config = Arc::new(config);
    // Each connection's thread holds a clone of it for as long as it lives.
    let connections = || Arc::strong_count(&config) - 1;
    while !sys::is_ending() {
        if connections().saturating_sub(RUNNING.load(SeqCst)) >= MOST_WAITING {
            thread::sleep(PAUSE);
        } else if sys::poll_one(&listener, sys::POLLIN, TICK) != 0 {
            match listener.accept() {
                Ok((socket, peer)) => start_thread(&config, socket, peer),
                // No descriptor is to be had; or the client has left meanwhile, which is rare.
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
    drop(listener);
    log::line(format_args!("shutdown"));
    // Connections see the signal by themselves, and end after their commands.
    let begun = Instant::now();
    let mut deadline = begun + config.limits.grace + AFTER_GRACE;
    let mut heard = 0;
    while connections() > 0 && Instant::now() < deadline {
        let signals = sys::SIGNALS.load(SeqCst);
        if begun.elapsed() < SAME_SIGNAL {
            // Killed by name, both processes get the signal, and this one gets it twice.
            heard = signals;
        } else if signals > heard {
            IS_URGENT.store(true, SeqCst);
            deadline = deadline.min(Instant::now() + URGENT_TIME);
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Serves a client in a thread of its own. Where none is to be had, the client waits for one, and
/// with it all who come later: whatever ends gives one back.
fn start_thread(config: &Arc<Config>, socket: TcpStream, peer: SocketAddr) {
    // Shared with the thread, so that it is still there where that could not be started.
    let socket = Arc::new(socket);
    while !sys::is_ending() {
        let (config, socket) = (config.clone(), socket.clone());
        // A connection that fails just ends.
        let serve = move || {
            let client = Client { socket: &socket, peer, limits: &config.limits };
            connection::serve(client, &config.rules)
        };
        // `thread::spawn` would panic.
        if thread::Builder::new().stack_size(STACK).spawn(serve).is_ok() {
            return;
        }
        thread::sleep(PAUSE);
    }
}
