//! The threads between a command's pipes and its run: one reads stdout, one stderr, and where the request
//! has content, one feeds it to stdin. What they have to say goes into the run's channel.
//!
//! A pipe may stay open for as long as anybody holds its other end, and that need not be the command: so
//! nobody waits on one without looking up, once a tick, whether it is still wanted. The pipes' ends do not
//! block, since what poll(2) promised can be gone when it is used: somebody else may read the same pipe.

use crate::output::Source;
use crate::sys::{self, POLLIN, POLLOUT};
use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::SyncSender;
use std::{net::TcpStream, os::fd::AsFd, process::ChildStdin, time::Duration};

/// The longest that anything waits before it sees what else has happened. All times are kept to within a
/// tick.
pub const TICK: Duration = Duration::from_millis(100);
/// A silent stream must cost little, a loud one few calls: the buffer grows as long as reads fill it.
const FIRST_BUFFER: usize = 4 << 10;
const LARGEST_BUFFER: usize = 64 << 10;
/// The most that a pipe holds unless root says otherwise (pipe(7)). What an escaped process goes on writing
/// is not waited for.
const MOST_IN_PIPE: usize = 1 << 20;
/// Of content, on its way to stdin.
const FEED: usize = 16 << 10;

/// What a run is told by its threads.
pub enum Message {
    Output(Source, Vec<u8>),
    /// Nothing more comes from one of the outputs.
    Ended,
    /// The content ended before its length did. With the command's standard input, to be kept open: the
    /// command is not to take the part for the whole.
    BrokeOff(Option<ChildStdin>),
}

/// A request's content, as far as it has not come with the head.
pub struct Content<'a> {
    /// What came with the head.
    pub begun: &'a [u8],
    /// Bytes in all.
    pub length: u64,
    /// Where the rest comes from. Its reads time out after a tick.
    pub socket: &'a TcpStream,
}

/// Reads a pipe to its end. Once `is_over`, only what is in it at that moment.
pub fn read(
    mut pipe: impl Read + AsFd,
    source: Source,
    run: &SyncSender<Message>,
    is_over: &AtomicBool,
) {
    let mut buffer = Vec::new();
    let mut read_since_over = 0;
    while read_since_over <= MOST_IN_PIPE {
        let was_over = is_over.load(SeqCst);
        let wait = if was_over { Duration::ZERO } else { TICK };
        let is_ready = sys::poll_one(&pipe, POLLIN, wait) != 0;
        if !is_ready {
            if was_over {
                break;
            }
            continue;
        }
        if buffer.is_empty() {
            buffer.resize(FIRST_BUFFER, 0);
        }
        match pipe.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                // The run has gone where nobody receives any more.
                if run.send(Message::Output(source, buffer[..length].to_vec())).is_err() {
                    return;
                }
                if was_over {
                    read_since_over += length;
                }
                if length == buffer.len() {
                    buffer.resize((length * 4).min(LARGEST_BUFFER), 0);
                }
            }
            Err(error) if is_passing(&error) => {}
            Err(_) => break,
        }
    }
    let _ = run.send(Message::Ended);
}

/// Copies content to a command's standard input, and closes it behind the last byte. What a command that has
/// closed its input does not want is read all the same: unread, it would hide that the client leaves.
pub fn feed(content: &Content, stdin: ChildStdin, run: &SyncSender<Message>, is_over: &AtomicBool) {
    let mut stdin = Some(stdin);
    let mut left = content.length - content.begun.len() as u64;
    write_all(&mut stdin, content.begun, is_over);
    let mut buffer = vec![0; FEED];
    while left > 0 && !is_over.load(SeqCst) {
        let room = buffer.len().min(left as usize);
        let mut socket = content.socket;
        match socket.read(&mut buffer[..room]) {
            Err(error) if is_passing(&error) => {}
            Ok(0) | Err(_) => {
                let _ = run.send(Message::BrokeOff(stdin));
                return;
            }
            Ok(length) => {
                left -= length as u64;
                write_all(&mut stdin, &buffer[..length], is_over);
            }
        }
    }
}

/// Writes all, as the command takes it; drops the pipe where the command has closed its end.
fn write_all(stdin: &mut Option<ChildStdin>, mut bytes: &[u8], is_over: &AtomicBool) {
    while !bytes.is_empty() && !is_over.load(SeqCst) {
        let Some(pipe) = stdin else {
            return;
        };
        match pipe.write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if is_passing(&error) => {
                sys::poll_one(pipe, POLLOUT, TICK);
            }
            Err(_) => *stdin = None,
        }
    }
}

/// Whether a call failed only since it would have to wait, or was interrupted: it may be tried again. With a
/// timeout on its socket a call is interrupted now and then, whatever the handlers ask for (signal(7)).
pub fn is_passing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
