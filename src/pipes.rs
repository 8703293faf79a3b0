//! The threads between a command's pipes and its run: one reads stdout, one stderr, and where the request
//! has content, one feeds it to stdin. What they have to say goes into the run's channel.
//!
//! A pipe may stay open for as long as anybody holds its other end, and that need not be the command: so
//! nobody waits on one without looking up, once a tick, whether it is still wanted. The pipes' ends do not
//! block, since what poll(2) promised can be gone when it is used: somebody else may read the same pipe.

use crate::sys::{self, POLLIN, POLLOUT};
use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::SyncSender;
use std::{fs::File, net::TcpStream, time::Duration};

/// The longest that anything waits before it sees what else has happened. All times are kept to within a
/// tick.
pub const TICK: Duration = Duration::from_millis(100);
/// A reader waits longer: it would be woken for nothing, 20 times a second for each silent stream, and only
/// what somebody else keeps open makes it late.
const READ_TICK: Duration = Duration::from_millis(500);
/// A silent stream must cost little, a loud one few calls: the buffer grows as long as reads fill it.
const FIRST_BUFFER: usize = 4 << 10;
const LARGEST_BUFFER: usize = 32 << 10;
/// The most that a pipe holds unless root says otherwise (pipe(7)). What an escaped process goes on writing
/// is not waited for.
const MOST_IN_PIPE: usize = 1 << 20;
/// Of content, on its way to stdin.
const FEED: usize = 16 << 10;

/// What a run is told by its threads.
pub enum Message {
    /// Output, from which of `output::SOURCES`.
    Output(usize, Vec<u8>),
    /// Nothing more comes from one of them.
    Ended,
    /// The content ended before its length did. With the command's standard input, to be kept open: the
    /// command is not to take the part for the whole.
    BrokeOff(Option<File>),
}

/// A request's content.
pub struct Content<'a> {
    /// What came with the head.
    pub begun: &'a [u8],
    /// Where the rest comes from. Its reads time out after a tick.
    pub socket: &'a TcpStream,
    /// Bytes in all.
    pub length: u64,
}

/// Reads a pipe to its end. Once `is_over`, only what is in it at that moment.
pub fn read(mut pipe: File, source: usize, run: &SyncSender<Message>, is_over: &AtomicBool) {
    let (mut buffer, mut last_bytes) = (Vec::new(), 0);
    while last_bytes <= MOST_IN_PIPE {
        let is_last = is_over.load(SeqCst);
        let wait = if is_last { Duration::ZERO } else { READ_TICK };
        if sys::poll_one(&pipe, POLLIN, wait) == 0 {
            if is_last {
                break;
            }
            continue;
        }
        if buffer.is_empty() {
            buffer.resize(FIRST_BUFFER, 0);
        }
        let length = match pipe.read(&mut buffer) {
            Err(error) if is_passing(&error) => continue,
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        // Fails where nobody receives any more.
        if run.send(Message::Output(source, buffer[..length].to_vec())).is_err() {
            return;
        }
        if is_last {
            last_bytes += length;
        }
        if length == buffer.len() {
            buffer.resize((length * 4).min(LARGEST_BUFFER), 0);
        }
    }
    let _ = run.send(Message::Ended);
}

/// Copies content to a command's standard input, and closes it behind the last byte. What a command that has
/// closed its input does not want is read all the same: unread, it would hide that the client leaves.
pub fn feed(content: Content, stdin: File, run: &SyncSender<Message>, is_over: &AtomicBool) {
    let mut stdin = Some(stdin);
    let mut left = content.length - content.begun.len() as u64;
    write_all(&mut stdin, content.begun, is_over);
    let mut buffer = vec![0; FEED];
    while left > 0 && !is_over.load(SeqCst) {
        let room = left.min(FEED as u64) as usize;
        let mut socket = content.socket;
        match socket.read(&mut buffer[..room]) {
            Err(error) if is_passing(&error) => {}
            Ok(0) | Err(_) => return drop(run.send(Message::BrokeOff(stdin))),
            Ok(length) => {
                left -= length as u64;
                write_all(&mut stdin, &buffer[..length], is_over);
            }
        }
    }
}

/// Writes all, as the command takes it; drops the pipe where the command has closed its end.
fn write_all(stdin: &mut Option<File>, mut bytes: &[u8], is_over: &AtomicBool) {
    while let (Some(pipe), false) = (&mut *stdin, bytes.is_empty() || is_over.load(SeqCst)) {
        match pipe.write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if is_passing(&error) => _ = sys::poll_one(pipe, POLLOUT, TICK),
            Err(_) => *stdin = None,
        }
    }
}

/// Whether a call failed only since it would have to wait, or was interrupted: it may be tried again. With a
/// timeout on its socket a call is interrupted now and then, whatever the handlers ask for (signal(7)).
pub fn is_passing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
