//! Two processes: what was started stays as the supervisor, and its child is the server.
//!
//! The supervisor waits, hands signals on and reaps. It holds no socket and no lock, so nothing
//! keeps it from its last duty: when the server has ended, however that came about, to kill what
//! the server's commands have left. The server leads a session of its own, to which everything
//! belongs that commands start without setsid(2), and by whose number all of it is found; no table
//! has to be kept of what runs.

use crate::{processes, sys};
use std::{io, process, thread, time::Duration, time::Instant};

/// How long what is left is being killed. More than one round is needed for what was just forking.
const KILL_TIME: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(2);

/// Splits the program in two, and returns in the server. The supervisor ends here, with the
/// server's exit status, when the server has ended and all it left was killed. Call it before any
/// thread is started.
pub fn split() -> io::Result<()> {
    let Some(server) = sys::fork_server()? else { return Ok(()) };
    let mut exited = sys::wait_noreap()?;
    while exited != server {
        // As process 1 of a container it is the parent of all whose own parent has ended.
        sys::reap(exited)?;
        exited = sys::wait_noreap()?;
    }
    // The server is a zombie until it is reaped, so no other session can have got its number.
    kill_session(server);
    process::exit(sys::reap(server)?)
}

/// Kills what is left of the session, until nothing is but zombies and what may not be signalled.
fn kill_session(session: u32) {
    let begun = Instant::now();
    let mut is_any_hit = true;
    while is_any_hit && begun.elapsed() < KILL_TIME {
        is_any_hit = false;
        for left in processes::all().iter().filter(|p| p.session == session && !p.is_zombie) {
            is_any_hit |= sys::send(left.pid, sys::SIGKILL);
        }
        thread::sleep(PAUSE);
    }
}
