//! A command as a process group with its pipes: started, signalled with all that it started, and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's number cannot
//! have gone to somebody else: drain, signal, reap.

use crate::processes::{self, Process};
use crate::refusal::Refusal;
use crate::sys;
use std::os::unix::{ffi::OsStrExt, process::CommandExt};
use std::process::{self, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::{ffi::OsStr, fs::File, io, thread};

/// Of the thread that waits for what could not be killed.
const STACK: usize = 64 << 10;

/// A started command. It is killed with its group, and reaped, on every way out.
pub struct Child {
    pub pid: u32,
    process: process::Child,
    is_reaped: bool,
    /// What it started outside its group, as far as that was looked for.
    strays: Vec<Process>,
}

/// The server's ends of a command's pipes.
pub struct Pipes {
    pub stdin: Option<ChildStdin>,
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
}

impl Child {
    /// Starts a command in a process group of its own. `is_fed` gives it a pipe as standard input.
    pub fn start(words: &[Vec<u8>], is_fed: bool) -> Result<(Child, Pipes), Refusal> {
        let (program, arguments) = words.split_first().expect("a command line has a word");
        let mut command = Command::new(OsStr::from_bytes(program));
        for argument in arguments {
            command.arg(OsStr::from_bytes(argument));
        }
        // With these alone std starts it by posix_spawn(3): a fork of the whole server costs two to three
        // times as much, and execvp(3) hands a file that the kernel cannot execute to a shell.
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if is_fed { Stdio::piped() } else { no_input() });
        let spawned = command.spawn();
        let mut process = spawned.map_err(|error| why_not_started(&error, program))?;
        let stdin = process.stdin.take().filter(|_| is_fed);
        let stdout = process.stdout.take().expect("stdout is a pipe");
        let stderr = process.stderr.take().expect("stderr is a pipe");
        sys::set_nonblocking(&stdout);
        sys::set_nonblocking(&stderr);
        if let Some(stdin) = &stdin {
            sys::set_nonblocking(stdin);
        }
        let child = Child { pid: process.id(), process, is_reaped: false, strays: Vec::new() };
        let pipes = Pipes { stdin, stdout, stderr };
        Ok((child, pipes))
    }

    /// Whether the leader has exited.
    pub fn has_exited(&self) -> bool {
        // A wait that fails could only go on failing, and must not keep the run for ever.
        sys::has_exited_noreap(self.pid).unwrap_or(true)
    }

    /// Asks the command to end, and all that it started: its group, and one by one what is outside of it.
    /// Only its own group is ever signalled as a group, since another one could hold anybody.
    pub fn terminate(&mut self) {
        // Found first: what has lost its parent to the signal is nobody's descendant any more.
        self.find_strays();
        // One that is stopped would not notice before SIGCONT.
        for signal in [sys::SIGTERM, sys::SIGCONT] {
            self.signal(signal);
        }
    }

    /// Kills the command, what it started, and what was found when it was asked to end.
    pub fn kill(&mut self) {
        self.find_strays();
        self.signal(sys::SIGKILL);
    }

    /// Kills what is left of the group.
    pub fn kill_group(&self) {
        sys::send_group(self.pid, sys::SIGKILL);
    }

    /// Whether nothing is left alive of the group, and of what was found outside of it.
    pub fn is_alone(&self) -> bool {
        let processes = processes::recent();
        let is_stray = |process: &Process| {
            let is_same =
                |stray: &Process| stray.pid == process.pid && stray.start == process.start;
            self.strays.iter().any(is_same)
        };
        let is_left = |process: &Process| process.group == self.pid || is_stray(process);
        !processes.iter().any(|process| is_left(process) && !process.is_zombie)
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
        let builder = thread::Builder::new().stack_size(STACK);
        let _ = builder.spawn(move || self.process.wait());
    }

    fn find_strays(&mut self) {
        // The server leads the session that it and all commands belong to.
        let session = process::id();
        let family = processes::family(&processes::recent(), session, self.pid, &self.strays);
        self.strays = family;
        self.strays.retain(|process| process.group != self.pid);
    }

    fn signal(&self, signal: i32) {
        sys::send_group(self.pid, signal);
        for stray in &self.strays {
            sys::send(stray.pid, signal);
        }
    }
}

impl Drop for Child {
    /// The way out of a run that was never begun, or that panicked.
    fn drop(&mut self) {
        if !self.is_reaped {
            self.kill();
            let _ = self.process.wait();
        }
    }
}

/// A standard input that is at its end.
fn no_input() -> Stdio {
    match File::open("/dev/null") {
        Ok(null) => Stdio::from(null),
        // An empty root has no such file; a pipe that nobody writes to reads the same.
        Err(_) => Stdio::piped(),
    }
}

fn why_not_started(error: &io::Error, program: &[u8]) -> Refusal {
    // errno(3)
    const ENOENT: i32 = 2;
    const ENOEXEC: i32 = 8;
    const EAGAIN: i32 = 11;
    const ENOMEM: i32 = 12;
    const ENOTDIR: i32 = 20;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENAMETOOLONG: i32 = 36;
    let program = program.to_vec();
    match error.raw_os_error() {
        Some(EAGAIN) => Refusal::Busy("process"),
        Some(ENOMEM) => Refusal::Busy("memory"),
        Some(ENFILE | EMFILE) => Refusal::Busy("descriptor"),
        // What the search along PATH says where it finds nothing.
        Some(ENOENT | ENOTDIR | ENAMETOOLONG) => Refusal::NoProgram(program),
        Some(ENOEXEC) => {
            let why = "neither a program for this processor, nor a script that begins with #!";
            Refusal::CannotRun(program, why.to_string())
        }
        _ => {
            // Without the number that std puts behind the system's words.
            let text = error.to_string();
            let (words, _) = text.split_once(" (os error").unwrap_or((&text, ""));
            Refusal::CannotRun(program, words.to_string())
        }
    }
}
