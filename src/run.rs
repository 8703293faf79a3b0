//! The one loop: everything that can happen to a running command's stream, and to its command, happens here.
//!
//! The connection's thread waits on the channel for what the readers have read, encodes it and writes all that is ready in one write. A
//! slow client slows the command down, since the channel is bounded. On every turn it looks, at most once a tick, at what else can end
//! a command: the client, the leader's exit, time, and the server's own end. The way not taken, a thread for each of these, costs more
//! per run than the spawn and needs locks where this needs none.

use crate::child::{Child, Feeder, Piece};
use crate::log::{self, Quoted};
use crate::request::{Answer, Result};
use crate::{listener::Connection, output::SOURCES, output::Stream, sys};
use std::io::{Error, ErrorKind, Write};
use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
use std::time::{Duration, Instant};
use std::{os::unix::prelude::*, thread};

/// How often a stream looks around, and the longest that a write blocks in one call. A client that is gone may take two looks to
/// tell from one that has only finished sending; its command is to be told within half a second. All times are kept to within a tick.
pub const TICK: Duration = Duration::from_millis(100);

/// What a command left running may pause for before the stream ends.
const QUIET: Duration = Duration::from_millis(250);
/// What is ready is sent in one write, once it is about this long; a last piece may add six times its length.
const BATCH: usize = 64 << 10;

/// The options that bound a command's life.
pub struct Limits {
    /// Zero is none.
    pub timeout: Duration,
    pub grace: Duration,
    pub heartbeat: Duration,
    pub stall: Duration,
    pub verbose: bool,
}

/// Streams a command that was started from `line`, and sees to its end. `Gone` where not all was written, `exit` included.
pub fn run(
    line: &[u8],
    child: Child,
    feeder: Option<&Feeder>,
    connection: &Connection,
    limits: &Limits,
    stream: Stream,
) -> Result<()> {
    let now = Instant::now();
    let mut run = Run {
        child,
        feeder,
        connection,
        limits,
        stream,
        bytes: [0; 2],
        started: now,
        looked: now,
        written: now,
        heard: now,
        lost: None,
        ending: None,
        exited: None,
        killed: false,
    };
    run.log("run", format_args!("command={}", Quoted(line)));
    run.stream.start(run.child.pid());
    run.send();
    run.turn_until_over();
    run.finish()
}

struct Run<'a> {
    child: Child,
    feeder: Option<&'a Feeder>,
    connection: &'a Connection,
    limits: &'a Limits,
    stream: Stream,
    /// Read so far from stdout and from stderr.
    bytes: [u64; 2],
    started: Instant,
    /// When it last looked around.
    looked: Instant,
    /// When something was last written, or would have been: silence counts from here.
    written: Instant,
    /// When output was last taken and passed on.
    heard: Instant,
    /// How the client was lost: `gone` or `stalled`.
    lost: Option<&'static str>,
    /// Why and since when the server ends the command. `exit` tells the word; where it is empty, how the leader ended.
    ending: Option<(&'static str, Instant)>,
    /// When the leader was seen to have exited.
    exited: Option<Instant>,
    /// SIGKILL was sent: at the next look, who still holds the pipes is outside the group, and the readers are made to end.
    killed: bool,
}

impl Run<'_> {
    /// Until both pipes have ended and the leader has exited.
    fn turn_until_over(&mut self) {
        let mut nap = Duration::from_micros(20);
        loop {
            match self.child.pieces.recv_timeout(TICK) {
                Ok(piece) => self.pass_on(piece),
                Err(Timeout) => {}
                Err(Disconnected) if self.child.exited() => return,
                // A leader exits right after its pipes have ended, or, having closed them, at any time.
                Err(Disconnected) => {
                    thread::sleep(nap);
                    nap = (nap * 2).min(TICK);
                }
            }
            if self.looked.elapsed() >= TICK {
                self.look();
            }
            self.send();
        }
    }

    /// The outcome, last of all.
    fn finish(mut self) -> Result<()> {
        let status = self.child.reap();
        let how = match (self.ending.map_or("", |ending| ending.0), status.code()) {
            ("", Some(_)) => "exited",
            ("", None) => "killed",
            (ending, _) => ending,
        };
        let ms = self.started.elapsed().as_millis();
        self.stream.exit(how, status, ms, self.bytes);
        self.send();
        let number = match status.code() {
            Some(code) => format!("code={code}"),
            None => format!("signal={}", status.signal().unwrap_or(0)),
        };
        let (how, [stdout, stderr]) = (self.lost.unwrap_or(how), self.bytes);
        let bytes = format!("stdout_bytes={stdout} stderr_bytes={stderr}");
        self.log("exit", format_args!("out={how} {number} ms={ms} {bytes}"));
        self.lost.map_or(Ok(()), |_| Err(Answer::Gone))
    }

    /// Encodes a piece, and those that are ready behind it, up to a batch: the loop has more to do than an endless output.
    fn pass_on(&mut self, mut piece: Piece) {
        loop {
            let (source, bytes) = &piece;
            self.bytes[*source] += bytes.len() as u64;
            if self.limits.verbose {
                let name = SOURCES[*source];
                self.log(name, format_args!("out={}", Quoted(bytes)));
            }
            self.stream.piece(*source, bytes);
            if self.stream.batch.len() >= BATCH {
                break;
            }
            let Ok(next) = self.child.pieces.try_recv() else {
                break;
            };
            piece = next;
        }
        self.send();
        self.heard = Instant::now();
    }

    /// Looks at all that can end a command but its output.
    fn look(&mut self) {
        let now = Instant::now();
        let limits = self.limits;
        self.looked = now;
        if self.lost.is_none() {
            let state = sys::ready(&self.connection.socket, sys::POLLRDHUP | sys::POLLIN, 0);
            let half_closed = state & sys::POLLRDHUP != 0;
            // A connection's end looks like a half-close, or hides behind content that nobody has read. A comment brings it out: it is
            // answered with a reset, which the next look sees.
            if state & sys::POLLGONE != 0 || (half_closed && !self.stream.format.events) {
                self.lose("gone");
            } else if state != 0 || now - self.written >= limits.heartbeat {
                self.stream.comment();
                self.written = now;
            }
        }
        if self.exited.is_none() && self.child.exited() {
            self.exited = Some(now);
        }
        let is_running = self.exited.is_none();
        if sys::signals() > 0 {
            self.end("shutdown", "the server is shutting down");
        } else if is_running && self.feeder.is_some_and(Feeder::is_broken) {
            self.end("", "the request's content is malformed or breaks off");
        } else if is_running && !limits.timeout.is_zero() && now - self.started >= limits.timeout {
            self.end("timeout", "the command ran past --timeout");
        }
        if self.killed {
            self.child.stop_readers();
        } else if sys::signals() > 1 || self.is_over(now) {
            self.child.signal(sys::SIGKILL);
            self.killed = true;
        }
    }

    /// Whether what is left of the group has had its time: since it was asked to end, or since the leader has exited by itself.
    fn is_over(&self, now: Instant) -> bool {
        let is_quiet = |exited: Instant| now - exited.max(self.heard) >= QUIET;
        let is_late = |since: Instant| now - since >= self.limits.grace;
        match (self.ending, self.exited) {
            (Some((_, asked)), _) => is_late(asked),
            (None, Some(exited)) => is_quiet(exited) || is_late(exited),
            (None, None) => false,
        }
    }

    /// Asks the group to end, and tells the client why. The first reason counts.
    fn end(&mut self, ending: &'static str, why: &str) {
        if self.ending.is_none() {
            self.ending = Some((ending, Instant::now()));
            self.child.signal(sys::SIGTERM);
            // One that is stopped would not notice.
            self.child.signal(sys::SIGCONT);
            self.stream.error(why);
        }
    }

    fn lose(&mut self, how: &'static str) {
        self.lost = Some(how);
        self.end("", "");
    }

    /// Writes what the stream holds. For a client that is lost it is discarded, so that the command can end.
    fn send(&mut self) {
        let batch = self.stream.take();
        let mut rest = &batch[..];
        let mut progress = Instant::now();
        while !rest.is_empty() && self.lost.is_none() {
            match (&self.connection.socket).write(rest) {
                Ok(length) => {
                    rest = &rest[length..];
                    progress = Instant::now();
                    self.written = progress;
                    continue;
                }
                Err(error) if is_passing(&error) => {}
                // TCP_USER_TIMEOUT counts from what was last acknowledged, and may be the first to notice.
                Err(error) if error.kind() == ErrorKind::TimedOut => self.lose("stalled"),
                Err(_) => self.lose("gone"),
            }
            // It is the client that pauses, not the output.
            self.heard = Instant::now();
            let ends = sys::signals() > 1 || (sys::signals() > 0 && self.killed);
            if self.lost.is_none() && (ends || progress.elapsed() >= self.limits.stall) {
                self.lose("stalled");
            }
            if self.looked.elapsed() >= TICK {
                self.look();
            }
        }
        self.stream.give_back(batch);
    }

    fn log(&self, happening: &str, values: std::fmt::Arguments) {
        let (peer, pid) = (&self.connection.peer, self.child.pid());
        log::line(format_args!("{happening} peer={peer} pid={pid} {values}"));
    }
}

/// Whether a call on a socket only took too long, or was interrupted: it may be tried again.
pub fn is_passing(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
