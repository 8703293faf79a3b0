//! A command as a process group with its pipes: started, signalled and reaped.
//!
//! A leader that has exited stays a zombie until its group has been killed, so that the group's id cannot have gone to somebody else:
//! drain, signal, reap.

use crate::request::{Answer, Result};
use crate::sys;
use std::os::unix::{prelude::*, process::CommandExt};
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::{ffi::OsStr, fs::File, io, path::Path};

/// A started command. It is killed with its group, and reaped, on every way out.
pub struct Child {
    pub pid: u32,
    /// Its standard input, where it is fed.
    pub stdin: Option<File>,
    /// Where it writes to, by [`crate::output::SOURCES`], until each ends.
    pub outputs: [Option<File>; 2],
    pub is_reaped: bool,
    process: process::Child,
    guarded: Option<&'static AtomicU32>,
}

impl Child {
    /// Starts a command in a process group of its own.
    pub fn start(words: &[Vec<u8>], stdin: Stdio) -> Result<Child> {
        let mut words = words.iter().map(|word| OsStr::from_bytes(word));
        let program = words.next().unwrap_or_default();
        let mut command = Command::new(program);
        command.args(words).process_group(0).stdin(stdin);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let spawned = command.spawn();
        let mut process = spawned.map_err(|error| why_not_started(&error, program))?;
        let stdin = process.stdin.take().map(OwnedFd::from);
        let stdout = process.stdout.take().map(OwnedFd::from);
        let stderr = process.stderr.take().map(OwnedFd::from);
        Ok(Child {
            pid: process.id(),
            stdin: stdin.map(File::from),
            outputs: [stdout, stderr].map(|output| output.map(File::from)),
            is_reaped: false,
            guarded: sys::guard(process.id()),
            process,
        })
    }

    /// Signals the group, unless its leader was reaped: the id may be somebody else's then.
    pub fn signal(&self, signal: i32) {
        if !self.is_reaped {
            sys::kill_group(self.pid, signal);
        }
    }

    /// Kills what is left of the group, and reaps the leader.
    pub fn reap(&mut self) -> ExitStatus {
        self.signal(sys::SIGKILL);
        self.guarded.take().inspect(|place| place.store(0, SeqCst));
        self.is_reaped = true;
        self.process.wait().unwrap_or_default()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.reap();
    }
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
