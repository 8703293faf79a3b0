//! A command as a process group with its pipes: started, read, fed, signalled and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's id cannot have gone to somebody else:
//! drain, signal, reap. Reader threads block in `read`, the cheapest way to wait, and are woken by a signal where something outside
//! the group keeps a pipe open; a `poll` before each read would cost a call per piece of output.

use crate::output::{Format, SOURCES};
use crate::request::{Answer, Content, Result};
use crate::{listener::Input, sys};
use std::io::{self, ErrorKind, prelude::*};
use std::os::unix::{prelude::*, process::CommandExt};
use std::process::{self, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{ffi::OsStr, fs::File, path::Path, sync::Arc};

/// Of every thread. Buffers are on the heap; a 32-bit host has no 2 MiB for each of hundreds.
const STACK: usize = 128 << 10;
/// A silent stream must cost little, a loud one few calls: buffers grow as long as reads fill them.
const FIRST_BUFFER: usize = 4 << 10;
const LARGEST_BUFFER: usize = 32 << 10;
/// Pieces that wait to be taken. More would be memory, not speed.
const QUEUE: usize = 2;
/// The most that a pipe holds unless root says otherwise (pipe(7)). What an escaped process goes on writing is not waited for.
const MOST_IN_PIPE: usize = 1 << 20;

/// A connection's input, with the content of a request that may be a command's standard input.
pub type Feed = Content<io::BufReader<Input>>;

/// A piece of output, as it was read from one of [`SOURCES`].
pub type Piece = (usize, Vec<u8>);

/// A started command. It is killed with its group, and reaped, on every way out.
pub struct Child {
    process: process::Child,
    status: Option<ExitStatus>,
    guarded: Option<&'static AtomicU32>,
    readers: Vec<JoinHandle<()>>,
    /// Disconnected when both pipes have ended.
    pub pieces: Receiver<Piece>,
    /// Tells the readers to take what is there and end.
    stop: Arc<AtomicBool>,
}

/// Content on its way to a command's standard input.
pub struct Feeder {
    thread: JoinHandle<(Option<Feed>, Option<File>)>,
    /// Set by whoever wants the content back, or by the thread, when the content turned out malformed or broke off.
    stop: Arc<AtomicBool>,
}

impl Child {
    /// Starts a command in a process group of its own. Whatever a run needs is had before its command is started, so that one that
    /// cannot be served does nothing.
    pub fn start(words: &[Vec<u8>], stdin: OwnedFd, format: Format) -> Result<Child> {
        let (sender, pieces) = sync_channel(QUEUE);
        let stop = Arc::default();
        let (mut readers, mut ends) = (Vec::new(), Vec::new());
        for source in 0..SOURCES.len() {
            let (pipe, end) = sys::pipe().map_err(exhausted)?;
            let (stop, sender) = (Arc::clone(&stop), sender.clone());
            let read = move || read_pipe(source, pipe.into(), &stop, &sender);
            readers.push(thread_builder().spawn(read).map_err(exhausted)?);
            ends.push(end);
        }
        drop(sender);
        let program = OsStr::from_bytes(&words[0]);
        let mut command = Command::new(program);
        command.args(words[1..].iter().map(|word| OsStr::from_bytes(word)));
        command.process_group(0).stdin(stdin);
        ends.pop().map(|stderr| command.stderr(stderr));
        ends.pop().map(|stdout| command.stdout(stdout));
        let spawned = command.spawn();
        let process = spawned.map_err(|error| why_not_started(&error, program, format))?;
        let guarded = sys::guard(process.id());
        Ok(Child {
            process,
            status: None,
            guarded,
            readers,
            pieces,
            stop,
        })
    }

    /// Also the id of the group.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Signals the whole group.
    pub fn signal(&self, signal: i32) {
        if self.status.is_none() {
            sys::kill_group(self.pid(), signal);
        }
    }

    /// Whether the leader has exited. It stays a zombie.
    pub fn exited(&self) -> bool {
        sys::exited_noreap(self.pid())
    }

    /// Kills what is left of the group, and reaps the leader.
    pub fn reap(&mut self) -> ExitStatus {
        self.signal(sys::SIGKILL);
        self.guarded.take().inspect(|place| place.store(0, SeqCst));
        let waited = self.process.wait();
        *self.status.insert(waited.unwrap_or_default())
    }

    /// Makes the readers end, though somebody keeps the pipes open. To be called until the channel is disconnected.
    pub fn stop_readers(&self) {
        self.stop.store(true, SeqCst);
        self.readers.iter().for_each(sys::interrupt);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.reap();
    }
}

impl Feeder {
    /// Begins to read `content`; gives the end of a pipe from which it is to be had.
    pub fn start(mut content: Feed) -> Result<(Feeder, OwnedFd)> {
        let (end, pipe) = sys::pipe().map_err(exhausted)?;
        // Whoever types into a command may pause for as long as the command waits.
        content.input.get_mut().deadline = None;
        let stop = content.input.get_ref().interrupted.clone();
        let feed = move || write_content(content, pipe.into());
        let thread = thread_builder().spawn(feed).map_err(exhausted)?;
        Ok((Feeder { thread, stop }, end))
    }

    /// Whether the content turned out malformed, or broke off.
    pub fn is_broken(&self) -> bool {
        self.stop.load(SeqCst)
    }

    /// Gets the rest of the content back; none where it is broken.
    pub fn end(self) -> Option<Feed> {
        self.stop.store(true, SeqCst);
        while !self.thread.is_finished() {
            sys::interrupt(&self.thread);
            thread::sleep(Duration::from_micros(200));
        }
        self.stop.store(false, SeqCst);
        self.thread.join().ok()?.0
    }
}

pub fn exhausted(_: io::Error) -> Answer {
    Answer::Busy("out of threads or descriptors")
}

pub fn thread_builder() -> thread::Builder {
    thread::Builder::new().stack_size(STACK)
}

fn why_not_started(error: &io::Error, program: &OsStr, format: Format) -> Answer {
    let why = format!("cannot run {}: {error}", program.to_string_lossy());
    let number = error.raw_os_error().unwrap_or(0);
    // A script whose interpreter is missing is there, but cannot be run.
    let is_there = program.as_bytes().contains(&b'/') && Path::new(program).exists();
    match number {
        _ if sys::EXHAUSTED.contains(&number) => Answer::Busy("out of processes or descriptors"),
        _ if sys::NOT_FOUND.contains(&number) && !is_there => Answer::NoProgram(format, why),
        _ => Answer::CannotRun(format, why),
    }
}

fn read_pipe(source: usize, mut pipe: File, stop: &AtomicBool, pieces: &SyncSender<Piece>) {
    let (mut size, mut after_stop) = (FIRST_BUFFER, 0);
    // Silence needs no buffer.
    sys::ready(&pipe, sys::POLLIN, -1);
    while after_stop < MOST_IN_PIPE {
        let stopping = stop.load(SeqCst);
        if stopping && sys::ready(&pipe, sys::POLLIN, 0) & sys::POLLIN == 0 {
            return;
        }
        let mut piece = vec![0; size];
        match pipe.read(&mut piece) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => return,
            Ok(length) => piece.truncate(length),
        }
        if piece.len() == size {
            size = (size * 4).min(LARGEST_BUFFER);
        }
        after_stop += if stopping { piece.len() } else { 0 };
        if pieces.send((source, piece)).is_err() {
            return;
        }
    }
}

/// Writes content to a command as it comes. What a command that has closed its input does not want is read all the same, up to its end,
/// since the next request comes after it. Returns the content, unless it is broken, and the pipe, unless the content has ended: a
/// command is not to take the part for the whole.
fn write_content(mut content: Feed, pipe: File) -> (Option<Feed>, Option<File>) {
    let stop = content.input.get_ref().interrupted.clone();
    let mut pipe = Some(pipe);
    while !stop.load(SeqCst) {
        let piece = match content.piece() {
            Ok([]) => return (Some(content), None),
            Ok(piece) => piece,
            Err(answer) => {
                let asked = stop.swap(true, SeqCst) && answer == Answer::Gone;
                return (asked.then_some(content), pipe);
            }
        };
        let mut taken = piece.len();
        match pipe.as_mut().map(|pipe| pipe.write(piece)) {
            None => {}
            Some(Ok(length)) => taken = length,
            Some(Err(error)) if error.kind() == ErrorKind::Interrupted => taken = 0,
            Some(Err(_)) => pipe = None,
        }
        content.take(taken);
    }
    (Some(content), pipe)
}
