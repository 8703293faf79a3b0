//! The one loop: everything that can happen to a running command's stream, and to its command, happens here.
//!
//! The connection's thread waits on the channel for what the readers have read, encodes it and writes all that is ready in one write. A
//! slow client slows the command down, since the channel is bounded. On every turn it looks, at most once a tick, at what else can end
//! a command: the client, the leader's exit, time, and the server's own end. The way not taken, a thread for each of these, costs more
//! per run than the spawn and needs locks where this needs none.

use crate::child::{Child, Feed, Piece};
use crate::log::{self, Quoted};
use crate::{listener::Connection, output::SOURCES, output::Stream, sys};
use std::io::{Error, ErrorKind, Write};
use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
use std::time::{Duration, Instant};
use std::{os::unix::prelude::*, thread};

/// How often a silent stream looks around, and the longest that a write blocks in one call. A client that is gone may take two
/// looks to tell from one that has only finished sending; its command is to be told within half a second.
pub const TICK: Duration = Duration::from_millis(150);

/// What a command left running may pause for before the stream ends.
const QUIET: Duration = Duration::from_millis(250);
/// After SIGKILL the pipes end at once, unless somebody outside the group holds them.
const AFTER_KILL: Duration = Duration::from_millis(100);
/// How long content that goes on coming after the command's end is waited for.
const CONTENT_REST: Duration = Duration::from_secs(1);
const MOMENT: Duration = Duration::from_millis(1);
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

/// Streams a command that was started, and sees to its end. Returns whether all was written, `exit` included, and the content.
pub fn run(
    child: Child,
    connection: &Connection,
    limits: &Limits,
    stream: Stream,
) -> (bool, Option<Feed>) {
    let now = Instant::now();
    let mut run = Run {
        child,
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
        kill_at: None,
        stop_at: None,
    };
    run.stream.start(run.child.pid());
    run.send();
    run.turn_until_over();
    run.finish()
}

struct Run<'a> {
    child: Child,
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
    /// Why the server ends the command, if the word of `exit` tells; empty where it does not.
    ending: Option<&'static str>,
    /// When the leader was seen to have exited.
    exited: Option<Instant>,
    /// When the group gets SIGKILL.
    kill_at: Option<Instant>,
    /// When the readers are made to end, after SIGKILL.
    stop_at: Option<Instant>,
}

impl Run<'_> {
    /// Until both pipes have ended and the leader has exited.
    fn turn_until_over(&mut self) {
        let mut nap = Duration::from_micros(20);
        loop {
            let patience = self.patience();
            match self.child.pieces.recv_timeout(patience) {
                Ok(piece) => self.pass_on(piece),
                Err(Timeout) => self.look(),
                Err(Disconnected) if self.child.exited() => return,
                // A leader exits right after its pipes have ended, or, having closed them, at any time.
                Err(Disconnected) => {
                    thread::sleep(nap.min(patience));
                    if nap >= patience {
                        self.look();
                    }
                    nap = (nap * 2).min(TICK);
                }
            }
            self.send();
            if self.looked.elapsed() >= TICK {
                self.look();
            }
        }
    }

    /// The outcome, last of all.
    fn finish(mut self) -> (bool, Option<Feed>) {
        let status = self.child.reap();
        let how = match (self.ending.unwrap_or(""), status.code()) {
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
        let complete = self.lost.is_none();
        let wait = CONTENT_REST * complete.into();
        (complete, self.child.end_feed(wait))
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

    /// How long there is nothing to do unless output comes.
    fn patience(&self) -> Duration {
        let beat_at = self.written + self.limits.heartbeat;
        let look_at = beat_at.min(self.looked + TICK);
        let times = [Some(look_at), self.timeout_at(), self.kill_at, self.over_at()];
        let now = Instant::now();
        // What is past, is done already, and readers are to be stopped again and again.
        let due = times.into_iter().flatten().filter(|&at| at > now).min();
        let due = due.filter(|_| self.stop_at.is_none());
        due.map_or(MOMENT, |at| MOMENT.max(at - now))
    }

    /// Looks at all that can end a command but its output.
    fn look(&mut self) {
        let now = Instant::now();
        let due = |at: Option<Instant>| at.is_some_and(|at| now >= at);
        self.looked = now;
        if self.lost.is_none() {
            let state = sys::ready(&self.connection.socket, sys::POLLRDHUP | sys::POLLIN, 0);
            let half_closed = state & sys::POLLRDHUP != 0;
            // A connection's end looks like a half-close, or hides behind content that nobody has read. A comment brings it out: it is
            // answered with a reset, which the next look sees.
            if state & sys::POLLGONE != 0 || (half_closed && !self.stream.format.events) {
                self.lose("gone");
            } else if state != 0 || now - self.written >= self.limits.heartbeat {
                self.stream.comment();
                self.written = now;
            }
        }
        if self.exited.is_none() && self.child.exited() {
            self.exited = Some(now);
        }
        if sys::signals() > 0 {
            self.end("shutdown", "the server is shutting down");
        } else if self.exited.is_none() && self.child.content_is_broken() {
            self.end("", "the request's content is malformed or breaks off");
        } else if self.exited.is_none() && due(self.timeout_at()) {
            self.end("timeout", "the command ran past --timeout");
        }
        if self.stop_at.is_none()
            && (sys::signals() > 1 || due(self.kill_at) || due(self.over_at()))
        {
            self.child.signal(sys::SIGKILL);
            self.stop_at = Some(now + AFTER_KILL);
        }
        if due(self.stop_at) {
            self.child.stop_readers();
        }
    }

    fn timeout_at(&self) -> Option<Instant> {
        let timeout = self.limits.timeout;
        (!timeout.is_zero()).then(|| self.started + timeout)
    }

    /// Until when a command that has exited by itself may have left something that still writes.
    fn over_at(&self) -> Option<Instant> {
        let exited = self.exited.filter(|_| self.ending.is_none())?;
        Some((exited.max(self.heard) + QUIET).min(exited + self.limits.grace))
    }

    /// Asks the group to end, and tells the client why. The first reason counts.
    fn end(&mut self, ending: &'static str, why: &str) {
        if self.ending.is_none() {
            self.ending = Some(ending);
            self.child.signal(sys::SIGTERM);
            // One that is stopped would not notice.
            self.child.signal(sys::SIGCONT);
            self.kill_at = Some(Instant::now() + self.limits.grace);
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
            let ends = sys::signals() > 1 || (sys::signals() > 0 && self.stop_at.is_some());
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
