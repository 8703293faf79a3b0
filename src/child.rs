//! A command as a process group with its pipes: started, read, fed, signalled and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's id cannot have gone to somebody else:
//! drain, signal, reap. Reader threads block in `read`, the cheapest way to wait, and are woken by a signal where something outside
//! the group keeps a pipe open; a `poll` before each read would cost a call per piece of output.

use crate::listener::Input;
use crate::output::Source;
use crate::request::{Incoming, Refusal};
use crate::sys;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Of every thread. Buffers are on the heap; a 32-bit host has no 2 MiB for each of hundreds.
const STACK: usize = 128 << 10;
/// A silent stream must cost little, a loud one few calls: buffers grow as long as reads fill them.
const FIRST_BUFFER: usize = 4 << 10;
const LARGEST_BUFFER: usize = 64 << 10;
/// Pieces that wait to be taken. More would be memory, not speed.
const QUEUE: usize = 2;
/// The most that a pipe holds unless root says otherwise (pipe(7)). What an escaped process goes on writing is not waited for.
const MOST_IN_PIPE: usize = 1 << 20;

/// A request's content, on its way to a command's standard input.
pub type Feed = Incoming<BufReader<Input>>;

type Pieces = SyncSender<(Source, Vec<u8>)>;

/// A started command. It is killed with its group, and reaped, on every way out.
pub struct Child {
    process: process::Child,
    status: Option<ExitStatus>,
    readers: [JoinHandle<()>; 2],
    /// What was read; disconnected when both pipes have ended.
    pub pieces: Receiver<(Source, Vec<u8>)>,
    /// Tells the readers to take what is there and end.
    stop: Arc<AtomicBool>,
    feeder: Option<Feeder>,
}

struct Feeder {
    thread: JoinHandle<Option<Feed>>,
    hand_over: SyncSender<Feed>,
    interrupted: Arc<AtomicBool>,
    /// The content turned out malformed, or broke off.
    broken: Arc<AtomicBool>,
}

impl Child {
    /// Starts a command in a process group of its own, with `feed`, which it then takes, or `null` as standard input. Whatever a run
    /// needs is had before its command is started, so that one that cannot be served does nothing.
    pub fn start(
        words: &[Vec<u8>],
        null: &File,
        feed: &mut Option<Feed>,
    ) -> Result<Child, Refusal> {
        let exhausted = |_| Refusal::Busy("out of threads or descriptors");
        let (sender, pieces) = sync_channel(QUEUE);
        let stop = Arc::default();
        let (out, stdout) =
            start_reader(Source::Stdout, &stop, sender.clone()).map_err(exhausted)?;
        let (err, stderr) = start_reader(Source::Stderr, &stop, sender).map_err(exhausted)?;
        let (feeder, stdin) = match feed {
            None => (None, null.try_clone().map_err(exhausted)?.into()),
            Some(feed) => Feeder::start(feed).map_err(exhausted)?,
        };
        let program = OsStr::from_bytes(&words[0]);
        let arguments = words[1..].iter().map(|word| OsStr::from_bytes(word));
        let mut command = Command::new(program);
        command
            .args(arguments)
            .process_group(0)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr);
        let process = command
            .spawn()
            .map_err(|error| why_not_started(&error, program))?;
        if let Some((feeder, feed)) = feeder.as_ref().zip(feed.take()) {
            let _ = feeder.hand_over.send(feed);
        }
        Ok(Child {
            process,
            status: None,
            readers: [out, err],
            pieces,
            stop,
            feeder,
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
        *self
            .status
            .get_or_insert(self.process.wait().unwrap_or_default())
    }

    /// Makes the readers end, though somebody keeps the pipes open. To be called until the channel is disconnected.
    pub fn stop_readers(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.readers.iter().for_each(sys::interrupt);
    }

    /// Whether the content that it is fed turned out malformed, or broke off.
    pub fn content_is_broken(&self) -> bool {
        self.feeder
            .as_ref()
            .is_some_and(|feeder| feeder.broken.load(Ordering::SeqCst))
    }

    /// Gets the connection's input back, after waiting up to `wait` for the content's end.
    pub fn end_feed(&mut self, wait: Duration) -> Option<Feed> {
        let feeder = self.feeder.take()?;
        let deadline = Instant::now() + wait;
        while !feeder.thread.is_finished() {
            if Instant::now() >= deadline {
                feeder.interrupted.store(true, Ordering::SeqCst);
                sys::interrupt(&feeder.thread);
            }
            thread::sleep(Duration::from_micros(200));
        }
        feeder.thread.join().ok().flatten()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.reap();
    }
}

impl Feeder {
    /// A thread that waits for `feed`, and the pipe's other end.
    fn start(feed: &Feed) -> io::Result<(Option<Feeder>, OwnedFd)> {
        let (end, pipe) = sys::pipe()?;
        let (hand_over, handed) = sync_channel::<Feed>(1);
        let interrupted = feed.input.get_ref().interrupted.clone();
        let broken = Arc::new(AtomicBool::new(false));
        let breaks = broken.clone();
        let thread = thread_builder().spawn(move || {
            let mut feed = handed.recv().ok()?;
            let result = write_content(&mut feed, pipe.into());
            breaks.store(result.is_err(), Ordering::SeqCst);
            Some(feed)
        })?;
        Ok((
            Some(Feeder {
                thread,
                hand_over,
                interrupted,
                broken,
            }),
            end,
        ))
    }
}

pub fn thread_builder() -> thread::Builder {
    thread::Builder::new().stack_size(STACK)
}

fn why_not_started(error: &io::Error, program: &OsStr) -> Refusal {
    let why = format!("cannot run {}: {error}", program.to_string_lossy());
    let number = error.raw_os_error().unwrap_or(0);
    // A script whose interpreter is missing is there, but cannot be run.
    let is_there = program.as_bytes().contains(&b'/') && Path::new(program).exists();
    if sys::EXHAUSTED.contains(&number) {
        Refusal::Busy("out of processes or descriptors")
    } else if sys::NOT_FOUND.contains(&number) && !is_there {
        Refusal::NoProgram(why)
    } else {
        Refusal::CannotRun(why)
    }
}

/// A thread that reads a new pipe, and the pipe's other end.
fn start_reader(
    source: Source,
    stop: &Arc<AtomicBool>,
    pieces: Pieces,
) -> io::Result<(JoinHandle<()>, OwnedFd)> {
    let (pipe, end) = sys::pipe()?;
    let stop = stop.clone();
    let thread = thread_builder().spawn(move || read_pipe(source, pipe.into(), &stop, &pieces))?;
    Ok((thread, end))
}

fn read_pipe(source: Source, mut pipe: File, stop: &AtomicBool, pieces: &Pieces) {
    let (mut size, mut after_stop) = (FIRST_BUFFER, 0);
    while after_stop < MOST_IN_PIPE {
        let stopping = stop.load(Ordering::SeqCst);
        if stopping && sys::ready(&pipe, sys::POLLIN) & sys::POLLIN == 0 {
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
/// since the next request comes after it.
fn write_content(feed: &mut Feed, pipe: File) -> Result<(), Refusal> {
    let mut pipe = Some(pipe);
    loop {
        let piece = feed.piece()?;
        if piece.is_empty() {
            return Ok(());
        }
        let written = match pipe.as_mut().map(|pipe| pipe.write(piece)) {
            None => piece.len(),
            Some(Ok(length)) => length,
            Some(Err(error)) if error.kind() == ErrorKind::Interrupted => 0,
            Some(Err(_)) => {
                pipe = None;
                0
            }
        };
        feed.take(written);
        if feed.input.get_ref().interrupted.load(Ordering::SeqCst) {
            return Err(Refusal::Gone);
        }
    }
}
