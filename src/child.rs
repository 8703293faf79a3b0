//! A command as a process group with its pipes: started, signalled with all that it started, and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's number cannot
//! have gone to somebody else: drain, signal, reap.

use crate::refusal::{self, Refusal, shown, words_of};
use crate::{processes, processes::Process, sys};
use std::os::{fd::OwnedFd, unix::ffi::OsStrExt, unix::process::CommandExt};
use std::process::{self, ChildStdin, Command, ExitStatus, Stdio};
use std::{ffi::OsStr, fs::File, io::Error, thread};

/// A started command, to be reaped, or ended, by who has it.
pub struct Child {
    pub pid: u32,
    /// None once it was reaped: its number may be somebody else's by then.
    process: Option<process::Child>,
    /// Itself and all that it started, as found when it was last looked for.
    family: Vec<Process>,
}

/// The server's ends of a command's pipes.
pub struct Pipes {
    /// Where the command is fed.
    pub stdin: Option<ChildStdin>,
    /// Its stdout and its stderr, as in `output::SOURCES`.
    pub outputs: [File; 2],
}

impl Child {
    /// Starts a command, of at least one word, in a process group of its own.
    pub fn start(words: &[Vec<u8>], is_fed: bool) -> Result<(Child, Pipes), Refusal> {
        let words: Vec<&OsStr> = words.iter().map(|word| OsStr::from_bytes(word)).collect();
        // With these alone std starts it by posix_spawn(3): a fork of the whole server costs two to three
        // times as much, and execvp(3) hands a file that the kernel cannot execute to a shell.
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).process_group(0);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        match File::open("/dev/null") {
            Ok(null) if !is_fed => command.stdin(null),
            // An empty root has no such file; a pipe that nobody writes to reads the same.
            _ => command.stdin(Stdio::piped()),
        };
        let mut process = command.spawn().map_err(|error| why_not_started(&error, words[0]))?;
        let stdout = OwnedFd::from(process.stdout.take().expect("stdout is a pipe"));
        let stderr = OwnedFd::from(process.stderr.take().expect("stderr is a pipe"));
        let stdin = process.stdin.take();
        let child = Child { pid: process.id(), process: Some(process), family: Vec::new() };
        Ok((child, Pipes { stdin, outputs: [stdout.into(), stderr.into()] }))
    }

    /// Whether the leader has exited.
    pub fn has_exited(&self) -> bool {
        // A wait that fails could only go on failing, and must not keep the run for ever.
        sys::exited_noreap(Some(self.pid)).map_or(true, |pid| pid > 0)
    }

    /// Sends a signal to the command and to all that it started: to its group, and one by one to what is
    /// outside of it, now or when it was looked for before. Only its own group is ever signalled as a group,
    /// since another one could hold anybody. What has left the session is left alone.
    pub fn signal(&mut self, signal: i32) {
        // Found first: what loses its parent to the signal is nobody's descendant any more.
        self.find_family();
        for number in [signal, sys::SIGCONT] {
            // One that is stopped would not notice before SIGCONT.
            sys::send_group(self.pid, number);
            for stray in self.family.iter().filter(|process| process.group != self.pid) {
                sys::send(stray.pid, number);
            }
        }
    }

    /// Whether nobody but the leader is known to be alive of it and all that it started.
    pub fn is_alone(&mut self) -> bool {
        self.find_family();
        let is_dead = |process: &Process| process.is_zombie || process.pid == self.pid;
        // Without /proc nobody is known, not even the leader.
        !self.family.is_empty() && self.family.iter().all(is_dead)
    }

    fn find_family(&mut self) {
        let found = processes::family(processes::all(), self.pid, &self.family);
        // Where no descriptor is left to read /proc with, those that were known have to do.
        if !found.is_empty() {
            self.family = found;
        }
    }

    /// Reaps the leader. One that cannot be killed has no status; a thread waits to reap it. Where none is
    /// to be had, it stays a zombie until the server ends.
    pub fn reap(&mut self) -> Option<ExitStatus> {
        let mut process = self.process.take()?;
        if self.has_exited() {
            return process.wait().ok();
        }
        let _ = thread::Builder::new().spawn(move || process.wait());
        None
    }

    /// Kills and reaps one that has not been reaped.
    pub fn end(&mut self) {
        if let Some(mut process) = self.process.take() {
            self.signal(sys::SIGKILL);
            let _ = process.wait();
        }
    }
}

fn why_not_started(error: &Error, program: &OsStr) -> Refusal {
    use std::io::ErrorKind::{NotADirectory, NotFound, OutOfMemory, WouldBlock};
    // errno(3). std has no words for these.
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENAMETOOLONG: i32 = 36;
    let program = shown(program.as_bytes());
    match (error.kind(), error.raw_os_error().unwrap_or(0)) {
        (WouldBlock | OutOfMemory, _) => refusal::BUSY.about("process"),
        (_, ENFILE | EMFILE) => refusal::BUSY.about("descriptor"),
        // What the search along PATH says where it finds nothing.
        (NotFound | NotADirectory, _) | (_, ENAMETOOLONG) => refusal::no_program(&program),
        _ => refusal::cannot_run(&program, &words_of(error)),
    }
}
