//! A command as a process group with its pipes: started, read, fed, signalled and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's id cannot have gone to somebody else:
//! drain, signal, reap. The threads that read and feed wait with `poll`, which looks up now and then: something outside the group
//! may keep a pipe open, and nothing else wakes a thread that is blocked in `read`. The way not taken, a signal to the thread, saves
//! a call for each piece of output and costs a handler, and a loop for the signal that comes too early.

use crate::listener::{Connection, TICK};
use crate::request::{Answer, Content, Result};
use crate::sys::{self, POLLIN, POLLOUT};
use std::io::{self, Read, Write};
use std::os::unix::{prelude::*, process::CommandExt};
use std::process::{self, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::{ffi::OsStr, fs::File, path::Path, sync::Arc, time::Duration};

/// Of every thread. Buffers are on the heap; a 32-bit host has no 2 MiB for each of hundreds.
const STACK: usize = 128 << 10;
/// A silent stream must cost little, a loud one few calls: buffers grow as long as reads fill them.
const FIRST_BUFFER: usize = 4 << 10;
const LARGEST_BUFFER: usize = 32 << 10;
/// Pieces that wait to be taken. More would be memory, not speed.
const QUEUE: usize = 2;
/// How often a reader looks up.
const READER_TICK: Duration = Duration::from_millis(250);
/// The most that a pipe holds unless root says otherwise (pipe(7)). What an escaped process goes on writing is not waited for.
const MOST_IN_PIPE: usize = 1 << 20;

/// A connection's input, with the content of a request that may be a command's standard input.
pub type Feed<'a> = Content<&'a Connection>;

/// The thread that feeds a command. It returns the command's standard input where the content broke off or was malformed.
pub type Feeder<'a> = ScopedJoinHandle<'a, Option<File>>;

/// A piece of output, as it was read from one of [`crate::output::SOURCES`].
pub type Piece = (usize, Vec<u8>);

/// A started command. It is killed with its group, and reaped, on every way out.
pub struct Child<'a> {
    /// Also the id of the group, which may be signalled until the leader is reaped.
    pub pid: u32,
    pub feeder: Option<Feeder<'a>>,
    /// Disconnected when both pipes have ended.
    pub pieces: Receiver<Piece>,
    /// Makes the readers take what is there and end, though somebody keeps the pipes open.
    pub stop: Arc<AtomicBool>,
    process: process::Child,
    guarded: Option<&'static AtomicU32>,
    is_reaped: bool,
}

impl<'a> Child<'a> {
    /// Starts a command in a process group of its own. Whatever a run needs is had before its command is started, so that one that
    /// cannot be served does nothing.
    pub fn start(words: &[Vec<u8>], stdin: OwnedFd, feeder: Option<Feeder<'a>>) -> Result<Self> {
        let (sender, pieces) = sync_channel(QUEUE);
        let stop: Arc<AtomicBool> = Arc::default();
        let start_reader = |source, sender| {
            let (pipe, end) = sys::pipe()?;
            let stop = stop.clone();
            let read = move || read_pipe(source, pipe.into(), &stop, &sender);
            thread_builder().spawn(read).map(|_| end)
        };
        let stdout = start_reader(0, sender.clone()).map_err(exhausted)?;
        let stderr = start_reader(1, sender).map_err(exhausted)?;
        let mut words = words.iter().map(|word| OsStr::from_bytes(word));
        let program = words.next().unwrap_or_default();
        let mut command = Command::new(program);
        command.args(words).process_group(0);
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        let spawned = command.spawn();
        let process = spawned.map_err(|error| why_not_started(&error, program))?;
        let pid = process.id();
        Ok(Child {
            pid,
            feeder,
            pieces,
            stop,
            process,
            guarded: sys::guard(pid),
            is_reaped: false,
        })
    }

    /// Kills what is left of the group, and reaps the leader.
    pub fn reap(&mut self) -> ExitStatus {
        sys::kill_group(self.pid, sys::SIGKILL);
        self.guarded.inspect(|place| place.store(0, SeqCst));
        self.is_reaped = true;
        self.process.wait().unwrap_or_default()
    }
}

impl Drop for Child<'_> {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if !self.is_reaped {
            self.reap();
        }
    }
}

/// Begins to feed a command from `content`; gives the end of a pipe that is to be its standard input. The thread ends with the
/// content, or when the connection is late.
pub fn start_feeder<'scope>(
    scope: &'scope Scope<'scope, '_>,
    content: &'scope mut Feed,
    connection: &'scope Connection,
) -> Result<(Option<Feeder<'scope>>, OwnedFd)> {
    let (end, pipe) = sys::pipe().map_err(exhausted)?;
    // Whoever types into a command may pause for as long as the command waits.
    connection.allow(Duration::from_secs(u32::MAX.into()));
    let feed = move || write_content(content, pipe.into(), connection);
    let thread = thread_builder().spawn_scoped(scope, feed);
    Ok((Some(thread.map_err(exhausted)?), end))
}

pub fn exhausted(_: io::Error) -> Answer {
    Answer::Busy("out of threads or descriptors")
}

pub fn thread_builder() -> thread::Builder {
    thread::Builder::new().stack_size(STACK)
}

fn why_not_started(error: &io::Error, program: &OsStr) -> Answer {
    let why = format!("cannot run {}: {error}", program.to_string_lossy());
    let number = error.raw_os_error().unwrap_or(0);
    // A script whose interpreter is missing is there, but cannot be run.
    let is_there = program.as_bytes().contains(&b'/') && Path::new(program).exists();
    match number {
        _ if sys::EXHAUSTED.contains(&number) => Answer::Busy("out of processes or descriptors"),
        _ if sys::NOT_FOUND.contains(&number) && !is_there => Answer::NotStarted(127, why),
        _ => Answer::NotStarted(126, why),
    }
}

fn read_pipe(source: usize, mut pipe: File, stop: &AtomicBool, pieces: &SyncSender<Piece>) {
    let (mut size, mut after_stop) = (FIRST_BUFFER, 0);
    while after_stop < MOST_IN_PIPE {
        let is_stopping = stop.load(SeqCst);
        let wait = READER_TICK * u32::from(!is_stopping);
        // Silence needs no buffer.
        match sys::ready(&pipe, POLLIN, wait) {
            0 if is_stopping => return,
            0 => continue,
            _ => {}
        }
        let mut piece = vec![0; size];
        let length = pipe.read(&mut piece).unwrap_or(0);
        piece.truncate(length);
        if piece.len() == size {
            size = (size * 4).min(LARGEST_BUFFER);
        }
        after_stop += if is_stopping { piece.len() } else { 0 };
        if piece.is_empty() || pieces.send((source, piece)).is_err() {
            return;
        }
    }
}

/// Writes content to a command as it comes. What a command that has closed its input does not want is read all the same, up to its end,
/// since the next request comes after it. Content that has no proper end keeps the pipe open: a command is not to take the part for
/// the whole.
fn write_content(content: &mut Feed, pipe: File, connection: &Connection) -> Option<File> {
    let mut pipe = Some(pipe);
    let done = content.read(u64::MAX, |mut piece| {
        while let (Some(file), false) = (&mut pipe, piece.is_empty()) {
            match sys::ready(&*file, POLLOUT, TICK) {
                0 if !connection.is_late() => {}
                // Room for a piece, which then is written whole.
                POLLOUT => piece = &piece[file.write(piece).unwrap_or(0)..],
                _ => pipe = None,
            }
        }
    });
    pipe.filter(|_| done.is_err())
}
