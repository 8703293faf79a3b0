//! A command as a process group with three pipes: started, read, fed, signalled and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's id cannot have gone to somebody else:
//! the group is never signalled after [`Child::reap`]. Reader threads block in `read`, the cheapest way to wait, and are woken by a
//! signal where something outside the group keeps the pipe open; a `poll` before each read would cost a call per piece of output.

use crate::listener::Input;
use crate::output::{Source, Status};
use crate::request::{Content, Refusal};
use crate::sys;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{self, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Of every thread. Buffers are on the heap; a 32-bit host has no 2 MiB for each of hundreds.
pub const STACK: usize = 128 << 10;

/// A silent stream must cost little, a loud one few calls: buffers grow as long as reads fill them.
const FIRST_BUFFER: usize = 4 << 10;
const LARGEST_BUFFER: usize = 64 << 10;
/// Pieces that wait to be taken. More would be memory, not speed.
const QUEUE: usize = 2;
/// The most that a pipe holds unless root says otherwise (pipe(7)). What an escaped process goes on writing is not waited for.
const MOST_IN_PIPE: usize = 1 << 20;

/// A piece of output, as it was read.
pub type Piece = (Source, Vec<u8>);

/// A started command. It is killed with its group, and reaped, on every way out.
pub struct Child {
    process: process::Child,
    reaped: bool,
    readers: [JoinHandle<()>; 2],
    /// Disconnected when both pipes have ended.
    pub pieces: Receiver<Piece>,
    /// Tells the readers to take what is there and end.
    stop: Arc<AtomicBool>,
    feeder: Option<Feeder>,
}

/// A request's content on its way to a command's standard input.
pub struct Feed {
    pub input: BufReader<Input>,
    pub content: Content,
}

/// Why nothing was started.
pub enum Failure {
    NoProgram(String),
    CannotRun(String),
    /// Descriptors, threads or processes have run out.
    Busy(&'static str),
}

struct Feeder {
    thread: JoinHandle<Feed>,
    /// Nothing is read before a word comes through here.
    gate: SyncSender<()>,
    interrupted: Arc<AtomicBool>,
    /// The content turned out malformed, or broke off.
    broken: Arc<AtomicBool>,
}

impl Child {
    /// Starts a command in a process group of its own. Standard input is `feed`, or `null`. Whatever a run needs is had before its
    /// command is started, so that one that cannot be served does nothing. `feed` comes back, where it can, with the failure.
    pub fn start(
        words: &[Vec<u8>],
        null: &File,
        feed: Option<Feed>,
    ) -> Result<Child, (Failure, Option<Feed>)> {
        let (sender, pieces) = sync_channel(QUEUE);
        let stop = Arc::new(AtomicBool::new(false));
        let prepared = start_reader(Source::Stdout, &stop, sender.clone())
            .and_then(|stdout| Ok((stdout, start_reader(Source::Stderr, &stop, sender)?)))
            .and_then(|readers| match &feed {
                None => Ok((readers, null.try_clone()?.into(), None)),
                Some(_) => sys::pipe().map(|(end, own)| (readers, end, Some(own))),
            });
        let (((stdout_reader, stdout), (stderr_reader, stderr)), stdin, own_end) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Err((Failure::of(&error, OsStr::new("it")), feed)),
        };
        let feeder = match feed
            .zip(own_end)
            .map(|(feed, own_end)| Feeder::start(feed, own_end))
            .transpose()
        {
            Ok(feeder) => feeder,
            // The thread that did not start took the content with it: the connection cannot go on.
            Err(error) => return Err((Failure::of(&error, OsStr::new("it")), None)),
        };
        let program = OsStr::from_bytes(&words[0]);
        let mut command = Command::new(program);
        command
            .args(words[1..].iter().map(|word| OsStr::from_bytes(word)))
            .process_group(0);
        // The command's ends of the pipes go with `command`, when this function returns.
        match command.stdin(stdin).stdout(stdout).stderr(stderr).spawn() {
            Ok(process) => {
                if let Some(feeder) = &feeder {
                    let _ = feeder.gate.send(());
                }
                Ok(Child {
                    process,
                    reaped: false,
                    readers: [stdout_reader, stderr_reader],
                    pieces,
                    stop,
                    feeder,
                })
            }
            Err(error) => Err((
                Failure::of(&error, program),
                feeder.and_then(Feeder::never_begun),
            )),
        }
    }

    /// Also the id of the group.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Signals the whole group.
    pub fn signal(&self, signal: i32) {
        if !self.reaped {
            sys::kill_group(self.pid(), signal);
        }
    }

    /// Whether the leader has exited. It stays a zombie.
    pub fn exited(&self) -> bool {
        sys::exited_noreap(self.pid())
    }

    /// Kills what is left of the group, and reaps the leader.
    pub fn reap(&mut self) -> Status {
        self.signal(sys::SIGKILL);
        let status = self.process.wait();
        self.reaped = true;
        // Only a SIGCHLD that somebody ignores again could make the wait fail.
        let status = status.unwrap_or_default();
        status
            .code()
            .map(Status::Code)
            .or(status.signal().map(Status::Signal))
            .unwrap_or(Status::Code(0))
    }

    /// Makes the readers end, though somebody keeps the pipes open. To be called again until the channel is disconnected.
    pub fn stop_readers(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.readers
            .iter()
            .filter(|reader| !reader.is_finished())
            .for_each(sys::interrupt);
    }

    /// Whether the request's content turned out malformed, or broke off.
    pub fn content_is_broken(&self) -> bool {
        self.feeder
            .as_ref()
            .is_some_and(|feeder| feeder.broken.load(Ordering::SeqCst))
    }

    /// Gets the connection's input back, after waiting up to `wait` for the content's end.
    pub fn end_feed(&mut self, wait: Duration) -> Option<Feed> {
        self.feeder.take()?.end(wait)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            self.reap();
        }
    }
}

impl Failure {
    fn of(error: &io::Error, program: &OsStr) -> Failure {
        let why = format!("cannot run {}: {error}", program.to_string_lossy());
        match error.raw_os_error() {
            Some(sys::EAGAIN | sys::ENOMEM | sys::EMFILE | sys::ENFILE) => {
                Failure::Busy("out of processes, threads or descriptors")
            }
            // A script whose interpreter is missing is there, but cannot be run.
            Some(sys::ENOENT)
                if program.as_bytes().contains(&b'/') && Path::new(program).exists() =>
            {
                Failure::CannotRun(why)
            }
            Some(sys::ENOENT | sys::ENOTDIR | sys::ENAMETOOLONG) => Failure::NoProgram(why),
            _ => Failure::CannotRun(why),
        }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        match failure {
            Failure::NoProgram(why) => Refusal::NoProgram(why),
            Failure::CannotRun(why) => Refusal::CannotRun(why),
            Failure::Busy(why) => Refusal::Busy(why),
        }
    }
}

impl Feeder {
    fn start(mut feed: Feed, pipe: OwnedFd) -> io::Result<Feeder> {
        let (interrupted, broken) = (
            feed.input.get_ref().interrupted.clone(),
            Arc::new(AtomicBool::new(false)),
        );
        feed.input.get_mut().deadline = None;
        let (gate, opened) = sync_channel(1);
        let thread = {
            let (interrupted, broken) = (interrupted.clone(), broken.clone());
            thread_builder().spawn(move || {
                if opened.recv().is_ok() && write_content(&mut feed, pipe, &interrupted).is_err() {
                    broken.store(true, Ordering::SeqCst);
                }
                feed
            })?
        };
        Ok(Feeder {
            thread,
            gate,
            interrupted,
            broken,
        })
    }

    /// Gets the content back untouched.
    fn never_begun(self) -> Option<Feed> {
        drop(self.gate);
        self.thread.join().ok()
    }

    fn end(self, wait: Duration) -> Option<Feed> {
        let deadline = Instant::now() + wait;
        let mut nap = Duration::from_micros(20);
        while !self.thread.is_finished() {
            if Instant::now() >= deadline {
                self.interrupted.store(true, Ordering::SeqCst);
                sys::interrupt(&self.thread);
            }
            thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(1));
        }
        self.thread.join().ok()
    }
}

pub fn thread_builder() -> thread::Builder {
    thread::Builder::new().stack_size(STACK)
}

/// A thread that reads a new pipe, and the pipe's other end.
fn start_reader(
    source: Source,
    stop: &Arc<AtomicBool>,
    sender: SyncSender<Piece>,
) -> io::Result<(JoinHandle<()>, OwnedFd)> {
    let (own_end, end) = sys::pipe()?;
    let stop = stop.clone();
    let reader =
        thread_builder().spawn(move || read_pipe(source, own_end.into(), &stop, &sender))?;
    Ok((reader, end))
}

fn read_pipe(source: Source, mut pipe: File, stop: &AtomicBool, pieces: &SyncSender<Piece>) {
    let mut size = FIRST_BUFFER;
    let mut after_stop = 0;
    loop {
        if stop.load(Ordering::SeqCst)
            && (after_stop >= MOST_IN_PIPE || sys::ready(&pipe, sys::POLLIN) & sys::POLLIN == 0)
        {
            return;
        }
        let mut piece = vec![0; size];
        match pipe.read(&mut piece) {
            Ok(0) => return,
            Ok(length) => {
                piece.truncate(length);
                if length == size {
                    size = (size * 4).min(LARGEST_BUFFER);
                }
                if stop.load(Ordering::SeqCst) {
                    after_stop += length;
                }
                if pieces.send((source, piece)).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Writes content to a command as it comes. What a command that has closed its input does not want is read all the same, up to its end,
/// since the next request comes after it.
fn write_content(feed: &mut Feed, pipe: OwnedFd, interrupted: &AtomicBool) -> Result<(), Refusal> {
    let mut pipe = Some(File::from(pipe));
    loop {
        let piece = feed.content.next(&mut feed.input)?;
        if piece.is_empty() {
            return Ok(());
        }
        let written = match pipe.as_mut().map(|pipe| pipe.write(piece)) {
            None => piece.len(),
            Some(Ok(length)) => length,
            Some(Err(error)) if error.kind() == ErrorKind::Interrupted => {
                if interrupted.load(Ordering::SeqCst) {
                    return Err(Refusal::Gone);
                }
                0
            }
            Some(Err(_)) => {
                pipe = None;
                0
            }
        };
        feed.content.take(&mut feed.input, written);
    }
}
