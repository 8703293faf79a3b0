//! The threads between a command's pipes and its run: one reads stdout, one stderr, and where the
//! request has content, one feeds it to stdin. What they have to say goes into the run's channel.
//!
//! A pipe may stay open for as long as anybody holds its other end, and that need not be the
//! command: so nobody waits on one without looking up now and then whether it is still wanted. The
//! pipes' ends do not block, since what poll(2) promised can be gone when it is used: somebody else
//! may read the same pipe.

use crate::sys::{self, POLLIN, POLLOUT};
use std::io::{Chain, Error, ErrorKind, Read, Take, Write};
use std::sync::{atomic::AtomicBool, atomic::Ordering::SeqCst, mpsc::SyncSender};
use std::{fs::File, net::TcpStream, process::ChildStdin, time::Duration};

/// What a connection's thread waits for anything, before it sees what else has happened: times are
/// kept to within a tick or two.
pub const TICK: Duration = Duration::from_millis(100);
/// What a reader waits, before it sees whether the run is over. Mostly a pipe's end wakes it
/// before; it matters only for a pipe that somebody else keeps open, and a silent stream is to cost
/// few wake-ups.
const READ_TICK: Duration = Duration::from_millis(500);
/// The most that one read takes.
const BUFFER: usize = 32 << 10;
/// The most that a pipe holds unless root says otherwise (pipe(7)).
const MOST_IN_PIPE: usize = 1 << 20;

/// What a run is told by its threads.
pub enum Message {
    /// Output, from which of `output::SOURCES`.
    Output(usize, Vec<u8>),
    /// No more comes from one of them.
    Ended,
    /// The content ended before its length did. The command's input is kept open, so that it does
    /// not take the part for the whole.
    BrokeOff(ChildStdin),
}

/// How they tell it.
pub type Sender = SyncSender<Message>;

/// A request's content: what came with the head, and the rest from the socket, whose reads time out
/// after a tick; as much as its length says.
pub type Content<'a> = Take<Chain<&'a [u8], &'a TcpStream>>;

/// Reads a pipe to its end. Once the run is over, only what is in it at that moment: what a process
/// that has got away goes on writing is not waited for.
pub fn read(mut pipe: File, source: usize, messages: &Sender, is_over: &AtomicBool) {
    sys::set_nonblocking(&pipe);
    let mut rest = MOST_IN_PIPE;
    while rest > 0 {
        // Looked at before the read: what was in the pipe when the run was over is still read, up
        // to the first read that finds nothing.
        let is_last = is_over.load(SeqCst);
        if !is_last && sys::poll_one(&pipe, POLLIN, READ_TICK) == 0 {
            continue;
        }
        // Made now, so that a stream costs none while it is silent.
        let mut buffer = vec![0; BUFFER];
        match pipe.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                rest = rest.saturating_sub(if is_last { length } else { 0 });
                buffer.truncate(length);
                // Fails where nobody receives any more: a run that panicked.
                let _ = messages.send(Message::Output(source, buffer));
            }
            // Nothing is in the pipe.
            Err(error) if is_passing(&error) && !is_last => {}
            Err(_) => break,
        }
    }
    let _ = messages.send(Message::Ended);
}

/// Copies content to a command's standard input, and closes it behind the last byte. What a command
/// that has closed its input does not want is read all the same: unread, it would hide that the
/// client leaves.
pub fn feed(mut content: Content, mut stdin: ChildStdin, messages: &Sender, is_over: &AtomicBool) {
    sys::set_nonblocking(&stdin);
    let mut buffer = vec![0; BUFFER];
    while content.limit() > 0 && !is_over.load(SeqCst) {
        match content.read(&mut buffer) {
            Err(error) if is_passing(&error) => {}
            Ok(0) | Err(_) => return drop(messages.send(Message::BrokeOff(stdin))),
            Ok(length) => write_all(&mut stdin, &buffer[..length], is_over),
        }
    }
}

/// Writes all, as the command takes it, unless it has closed its end.
fn write_all(stdin: &mut ChildStdin, mut bytes: &[u8], is_over: &AtomicBool) {
    while !bytes.is_empty() && !is_over.load(SeqCst) {
        match stdin.write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if is_passing(&error) => _ = sys::poll_one(stdin, POLLOUT, TICK),
            Err(_) => return,
        }
    }
}

/// Whether a call failed only since it would have to wait, or was interrupted: it may be tried
/// again. With a timeout on its socket a call is interrupted now and then, whatever the handlers
/// ask for (signal(7)).
pub fn is_passing(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
