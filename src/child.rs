//! A command as a process group with its pipes: started, signalled with all that it started, and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's number cannot
//! have gone to somebody else: drain, signal, reap.

use crate::processes::{self, Process};
use crate::refusal::{self, Refusal, shown, words_of};
use crate::sys;
use std::os::unix::{ffi::OsStrExt, process::CommandExt};
use std::process::{self, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::{ffi::OsStr, fs::File, io, thread};

/// A started command. It is killed with its group, and reaped, on every way out.
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
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
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
        let pipes = Pipes {
            stdin: process.stdin.take().filter(|_| is_fed),
            stdout: process.stdout.take().expect("stdout is a pipe"),
            stderr: process.stderr.take().expect("stderr is a pipe"),
        };
        let child = Child { pid: process.id(), process: Some(process), family: Vec::new() };
        Ok((child, pipes))
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
        self.find_family();
        for signal in [signal, sys::SIGCONT] {
            // One that is stopped would not notice before SIGCONT.
            sys::send_group(self.pid, signal);
            for stray in self.family.iter().filter(|process| process.group != self.pid) {
                sys::send(stray.pid, signal);
            }
        }
    }

    fn find_family(&mut self) {
        self.family = processes::family(&processes::recent(), self.pid, &self.family);
    }

    /// Whether nobody but the leader is left alive of those that were there when it was last signalled.
    pub fn is_alone(&mut self) -> bool {
        // Most leaders were alone then, and need no search.
        if self.family.len() > 1 {
            self.find_family();
        }
        self.family.iter().all(|process| process.is_zombie || process.pid == self.pid)
    }

    /// Kills what is left of the group.
    pub fn kill_group(&self) {
        sys::send_group(self.pid, sys::SIGKILL);
    }

    /// Reaps the leader. One that cannot be killed has no status; a thread waits to reap it. Where none is
    /// to be had, it stays a zombie until the server ends.
    pub fn reap(&mut self) -> Option<ExitStatus> {
        let has_exited = self.has_exited();
        let mut process = self.process.take()?;
        if has_exited {
            return process.wait().ok();
        }
        let _ = thread::Builder::new().spawn(move || process.wait());
        None
    }
}

impl Drop for Child {
    /// The way out of a run that was never begun, or that panicked.
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            self.signal(sys::SIGKILL);
            let _ = process.wait();
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
