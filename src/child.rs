//! A command as a process group with its pipes: started, signalled with all that it started, and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's number cannot
//! have gone to somebody else: drain, signal, reap.

use crate::processes::{self, Process};
use crate::refusal::{self, Refusal, shown, words_of};
use crate::sys;
use std::os::fd::OwnedFd;
use std::os::unix::{ffi::OsStrExt, process::CommandExt};
use std::process::{self, Command, ExitStatus, Stdio};
use std::{ffi::OsStr, fs::File, io, thread};

/// A started command. It is killed with its group, and reaped, on every way out.
pub struct Child {
    pub pid: u32,
    process: process::Child,
    is_reaped: bool,
    /// What it started outside its group, as far as that was looked for.
    strays: Vec<Process>,
    /// Whether there was anybody but the leader when it was last signalled.
    has_company: bool,
}

/// The server's ends of a command's pipes, which do not block.
pub struct Pipes {
    /// Where the command is fed.
    pub stdin: Option<File>,
    /// By `output::SOURCES`.
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
        command.stdin(if is_fed { Stdio::piped() } else { no_input() });
        let spawned = command.spawn();
        let mut process = spawned.map_err(|error| why_not_started(&error, words[0]))?;
        let stdin = process.stdin.take().filter(|_| is_fed);
        let stdout = process.stdout.take().expect("stdout is a pipe");
        let stderr = process.stderr.take().expect("stderr is a pipe");
        let pipes = Pipes {
            stdin: stdin.map(|stdin| nonblocking(stdin.into())),
            outputs: [nonblocking(stdout.into()), nonblocking(stderr.into())],
        };
        let (pid, strays) = (process.id(), Vec::new());
        Ok((Child { pid, process, is_reaped: false, strays, has_company: false }, pipes))
    }

    /// Whether the leader has exited.
    pub fn has_exited(&self) -> bool {
        // A wait that fails could only go on failing, and must not keep the run for ever.
        sys::has_exited_noreap(self.pid).unwrap_or(true)
    }

    /// Sends a signal to the command and to all that it started: to its group, and one by one to what is
    /// outside of it, now or when it was looked for before. Only its own group is ever signalled as a group,
    /// since another one could hold anybody. What has left the session is left alone.
    pub fn signal(&mut self, signal: i32) {
        // Found first: what loses its parent to the signal is nobody's descendant any more.
        let all = processes::recent();
        self.strays = processes::family(&all, self.pid, &self.strays);
        self.strays.retain(|process| process.group != self.pid);
        let is_member = |other: &Process| other.group == self.pid && other.pid != self.pid;
        self.has_company = !self.strays.is_empty() || all.iter().any(is_member);
        for signal in [signal, sys::SIGCONT] {
            // One that is stopped would not notice before SIGCONT.
            sys::send_group(self.pid, signal);
            for stray in &self.strays {
                sys::send(stray.pid, signal);
            }
        }
    }

    /// Kills what is left of the group.
    pub fn kill_group(&self) {
        sys::send_group(self.pid, sys::SIGKILL);
    }

    /// Whether nothing but the leader is left alive of the group, and of what was found outside of it.
    pub fn is_alone(&self) -> bool {
        if !self.has_company {
            return true;
        }
        let is_left = |process: &Process| {
            let is_stray = self.strays.iter().any(|stray| stray.is_same(process));
            let is_member = process.group == self.pid && process.pid != self.pid;
            !process.is_zombie && (is_member || is_stray)
        };
        !processes::recent().iter().any(is_left)
    }

    /// Kills what is left of the group, and reaps the leader; fails where its status cannot be had.
    pub fn reap(&mut self) -> io::Result<ExitStatus> {
        self.kill_group();
        self.is_reaped = true;
        self.process.wait()
    }

    /// Gives the command up: a thread waits to reap it. Where none is to be had, it stays a zombie until the
    /// server ends.
    pub fn abandon(mut self) {
        self.is_reaped = true;
        let _ = thread::Builder::new().spawn(move || self.process.wait());
    }
}

impl Drop for Child {
    /// The way out of a run that was never begun, or that panicked.
    fn drop(&mut self) {
        if !self.is_reaped {
            self.signal(sys::SIGKILL);
            let _ = self.process.wait();
        }
    }
}

/// A standard input that is at its end.
fn no_input() -> Stdio {
    match File::open("/dev/null") {
        Ok(null) => null.into(),
        // An empty root has no such file; a pipe that nobody writes to reads the same.
        Err(_) => Stdio::piped(),
    }
}

fn nonblocking(pipe: OwnedFd) -> File {
    sys::set_nonblocking(&pipe);
    pipe.into()
}

fn why_not_started(error: &io::Error, program: &OsStr) -> Refusal {
    // errno(3)
    const ENOENT: i32 = 2;
    const ENOEXEC: i32 = 8;
    const EAGAIN: i32 = 11;
    const ENOMEM: i32 = 12;
    const ENOTDIR: i32 = 20;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENAMETOOLONG: i32 = 36;
    let program = shown(program.as_bytes());
    match error.raw_os_error().unwrap_or(0) {
        EAGAIN | ENOMEM => refusal::BUSY.about("process"),
        ENFILE | EMFILE => refusal::BUSY.about("descriptor"),
        // What the search along PATH says where it finds nothing.
        ENOENT | ENOTDIR | ENAMETOOLONG => refusal::no_program(&program),
        ENOEXEC => refusal::cannot_run(&program, "a script begins with #!"),
        _ => refusal::cannot_run(&program, &words_of(error)),
    }
}
