//! A command as a process group with its pipes: started, signalled with all that it started, and
//! reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's
//! number cannot have gone to somebody else: drain, signal, reap.

use crate::refusal::{self, Refusal, error_text, shown};
use crate::sys::{self, EMFILE, ENAMETOOLONG, ENFILE};
use crate::{processes, processes::Process};
use std::os::{fd::OwnedFd, unix::ffi::OsStrExt, unix::process::CommandExt};
use std::process::{self, ChildStdin, Command, ExitStatus, Stdio};
use std::{ffi::OsStr, fs::File, io::Error, thread};

/// How often more is looked for of what a command has started, since not all of it can be stopped.
const MOST_ROUNDS: u32 = 10;

/// A started command, to be reaped, or ended, by who has it.
pub struct Child {
    pub pid: u32,
    /// None once it was reaped: its number may be somebody else's by then.
    process: Option<process::Child>,
    /// Itself and all that it started, as found when it was last looked for.
    family: Vec<Process>,
}

type Started = (Child, [File; 2], Option<ChildStdin>);

impl Child {
    /// Starts a command, of at least one word, in a process group of its own. Returns also the
    /// server's ends of its pipes: stdout and stderr, and stdin where it is fed.
    pub fn start(words: &[Vec<u8>], is_fed: bool) -> Result<Started, Refusal> {
        let words: Vec<&OsStr> = words.iter().map(|word| OsStr::from_bytes(word)).collect();
        // std starts it by posix_spawn(3) as long as no user, no directory, no environment and no
        // code of our own is set here. Otherwise it would fork the whole server, which costs two to
        // three times as much, and then call execvp(3), which hands a file that the kernel cannot
        // execute to a shell.
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
        Ok((child, [stdout.into(), stderr.into()], stdin))
    }

    /// Sends signals to the command and to all that it started.
    ///
    /// All of it is stopped first: what runs could start more after /proc was read, and once its
    /// parent has ended, nothing tells any more whose that is. /proc is read until it shows no more
    /// than before.
    ///
    /// The command's own group is signalled as a whole; a process in another group by itself, since
    /// others may be in that. The kernel sends SIGHUP to a group that is orphaned while a process
    /// in it is stopped (exit(3)). Hence two rules: no process is stopped in a group whose leader
    /// is not of the family, and children go on before their parents.
    ///
    /// Left alone is a process that has called setsid(2), or has a group of its own and lost its
    /// parent before all this. (One that is just calling setsid(2) may stay stopped: nothing tells
    /// any more that it was the command's.)
    pub fn signal(&mut self, signals: &[i32]) {
        sys::send_group(self.pid, sys::SIGSTOP);
        self.find_family();
        // The leader alone needs no second look, as its group is stopped.
        let (mut found, mut rounds) = (1, 0);
        while self.family.len() > found && rounds < MOST_ROUNDS {
            (found, rounds) = (self.family.len(), rounds + 1);
            for process in &self.family {
                // Only in a group of the family's own.
                if self.family.iter().any(|leader| leader.pid == process.group) {
                    sys::send(process.pid, sys::SIGSTOP);
                }
            }
            self.find_family();
        }
        for signal in signals {
            // The youngest first.
            for stray in self.family.iter().rev().filter(|process| process.group != self.pid) {
                sys::send(stray.pid, *signal);
            }
            sys::send_group(self.pid, *signal);
        }
    }

    /// Whether of the command, which has exited, and of all that it started nobody lives any more.
    /// Without /proc nobody can tell.
    pub fn is_dead(&mut self) -> bool {
        self.find_family();
        // The leader is there in any case, a zombie.
        !self.family.is_empty() && self.family.iter().all(|process| process.is_zombie)
    }

    fn find_family(&mut self) {
        let found = processes::family(processes::all(), self.pid, &self.family);
        // Where no descriptor is left by which to read /proc, those that were known have to do.
        if !found.is_empty() {
            self.family = found;
        }
    }

    /// Reaps the leader. One that cannot be killed has no status; a thread is left behind to reap
    /// it. Without a thread it becomes a zombie until the server ends.
    pub fn reap(&mut self) -> Option<ExitStatus> {
        let mut process = self.process.take()?;
        if sys::has_exited(self.pid) {
            return process.wait().ok();
        }
        let _ = thread::Builder::new().spawn(move || process.wait());
        None
    }

    /// Kills and reaps one that has not been reaped. It waits for as long as that takes.
    pub fn end(&mut self) {
        if let Some(mut process) = self.process.take() {
            self.signal(&[sys::SIGKILL]);
            let _ = process.wait();
        }
    }
}

fn why_not_started(error: &Error, program: &OsStr) -> Refusal {
    use std::io::ErrorKind::{NotADirectory, NotFound, OutOfMemory, WouldBlock};
    let program = shown(program.as_bytes());
    match (error.kind(), error.raw_os_error()) {
        (WouldBlock | OutOfMemory, _) => refusal::BUSY.about("process"),
        (_, ENFILE | EMFILE) => refusal::BUSY.about("descriptor"),
        // What the search along PATH says where it finds nothing.
        (NotFound | NotADirectory, _) | (_, ENAMETOOLONG) => refusal::no_program(&program),
        _ => refusal::cannot_run(&program, &error_text(error)),
    }
}
