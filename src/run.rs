//! The one loop: everything that can happen to a running command's stream, and to its command, happens here.
//!
//! The connection's thread waits on the channel for what the readers have read, encodes it and writes all that is ready in one write. A
//! slow client slows the command down, since the channel is bounded. On every turn it looks, at most once a tick, at what else can end
//! a command: the client, the leader's exit, time, and the server's own end. The way not taken, a thread for each of these, costs more
//! per run than the spawn and needs locks where this needs none.

use crate::child::{Child, Piece};
use crate::listener::{Connection, TICK, is_passing};
use crate::log::{self, quoted};
use crate::request::{Answer, Result};
use crate::{output::SOURCES, output::Stream, sys};
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
use std::time::{Duration, Instant};
use std::{fs::File, iter::once, os::unix::prelude::*, thread};

/// How often a client that may be gone is written to. With a tick to see the answer, that is told from one that has only finished
/// sending well within half a second.
const PROBE: Duration = Duration::from_millis(200);
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

/// Streams a command, and sees to its end. `stream` begins with the response's head. `Gone` where not all was written, `exit` included.
pub fn run(child: Child, client: &Connection, limits: &Limits, stream: Stream) -> Result<()> {
    let now = Instant::now();
    let mut run = Run {
        child,
        client,
        limits,
        stream,
        started: now,
        looked: now,
        written: now,
        heard: now,
        broken: None,
        lost: None,
        ending: None,
        exited: None,
        killed: false,
    };
    run.stream.start(run.child.pid);
    run.send();
    let mut nap = Duration::from_micros(20);
    loop {
        match run.child.pieces.recv_timeout(TICK) {
            Ok(piece) => run.pass_on(piece),
            Err(Timeout) => {}
            Err(Disconnected) if sys::exited_noreap(run.child.pid) => return run.finish(),
            // A leader exits right after its pipes have ended, or, having closed them, at any time.
            Err(Disconnected) => {
                thread::sleep(nap);
                nap = (nap * 2).min(TICK);
            }
        }
        if run.looked.elapsed() >= TICK {
            run.look();
        }
        run.send();
    }
}

struct Run<'a> {
    child: Child<'a>,
    client: &'a Connection,
    limits: &'a Limits,
    stream: Stream,
    started: Instant,
    /// When it last looked around.
    looked: Instant,
    /// When something was last written, or would have been: silence counts from here.
    written: Instant,
    /// When output was last taken and passed on.
    heard: Instant,
    /// The command's standard input, where its content broke off.
    broken: Option<File>,
    /// How the client was lost: `gone` or `stalled`.
    lost: Option<&'static str>,
    /// Why and since when the server ends the command. `exit` tells the word; where it is empty, how the leader ended.
    ending: Option<(&'static str, Instant)>,
    /// When the leader was seen to have exited.
    exited: Option<Instant>,
    killed: bool,
}

impl Run<'_> {
    /// The outcome, last of all.
    fn finish(mut self) -> Result<()> {
        let status = self.child.reap();
        let how = match (self.ending.map_or("", |ending| ending.0), status.code()) {
            ("", Some(_)) => "exited",
            ("", None) => "killed",
            (ending, _) => ending,
        };
        let ms = self.started.elapsed().as_millis();
        self.stream.exit(how, status, ms);
        self.send();
        let number = match status.code() {
            Some(code) => format!("code={code}"),
            None => format!("signal={}", status.signal().unwrap_or(0)),
        };
        let (how, [stdout, stderr]) = (self.lost.unwrap_or(how), self.stream.bytes);
        let bytes = format!("stdout_bytes={stdout} stderr_bytes={stderr}");
        self.log("exit", format_args!("out={how} {number} ms={ms} {bytes}"));
        self.lost.map_or(Ok(()), |_| Err(Answer::Gone))
    }

    /// Encodes a piece, and those that are ready behind it, up to a batch: the loop has more to do than an endless output.
    fn pass_on(&mut self, piece: Piece) {
        for (source, bytes) in once(piece).chain(self.child.pieces.try_iter()) {
            if self.limits.verbose {
                self.log(SOURCES[source], format_args!("out={}", quoted(&bytes)));
            }
            self.stream.piece(source, &bytes);
            if self.stream.batch.len() >= BATCH {
                break;
            }
        }
        self.heard = Instant::now();
    }

    /// Looks at all that can end a command but its output.
    fn look(&mut self) {
        let now = Instant::now();
        let limits = self.limits;
        self.looked = now;
        if self.lost.is_none() {
            let events = sys::POLLRDHUP | sys::POLLIN;
            let state = sys::ready(&self.client.socket, events, Duration::ZERO);
            let half_closed = state & sys::POLLRDHUP != 0;
            // A connection's end looks like a half-close, or hides behind content that is not read. A comment brings it out: it is
            // answered with a reset, which the next look sees.
            let unsure = half_closed || (state != 0 && self.child.feeder.is_some());
            let longest = if unsure { PROBE } else { limits.heartbeat };
            if state & sys::POLLGONE != 0 || (half_closed && !self.stream.events) {
                self.lose("gone");
            } else if now - self.written >= longest {
                self.stream.comment();
                self.written = now;
            }
        }
        if let Some(feeder) = self.child.feeder.take_if(|feeder| feeder.is_finished()) {
            self.broken = feeder.join().unwrap_or_default();
        }
        if self.exited.is_none() && sys::exited_noreap(self.child.pid) {
            self.exited = Some(now);
        }
        let is_running = self.exited.is_none();
        if sys::signals() > 0 {
            self.end("shutdown", "the server is shutting down");
        } else if is_running && self.broken.is_some() {
            self.end("", "the request's content is malformed or breaks off");
        } else if is_running && !limits.timeout.is_zero() && now - self.started >= limits.timeout {
            self.end("timeout", "the command ran past --timeout");
        }
        if self.killed {
            // Who still holds the pipes is outside the group.
            self.child.stop.store(true, SeqCst);
        } else if sys::signals() > 1 || self.is_over(now) {
            sys::kill_group(self.child.pid, sys::SIGKILL);
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
            sys::kill_group(self.child.pid, sys::SIGTERM);
            // One that is stopped would not notice.
            sys::kill_group(self.child.pid, sys::SIGCONT);
            self.stream.error(why);
        }
    }

    fn lose(&mut self, how: &'static str) {
        self.lost = Some(how);
        // Wakes the feeder.
        let _ = self.client.socket.shutdown(Shutdown::Both);
        self.end("", "");
    }

    /// Writes what the stream holds. For a client that is lost it is discarded, so that the command can end.
    fn send(&mut self) {
        let (mut sent, mut progress) = (0, Instant::now());
        while self.lost.is_none() && sent < self.stream.ready().len() {
            let mut socket = &self.client.socket;
            match socket.write(&self.stream.batch[sent..]) {
                Ok(length) => {
                    sent += length;
                    progress = Instant::now();
                    self.written = progress;
                }
                Err(error) if is_passing(&error) => {
                    // It is the client that pauses, not the output.
                    self.heard = Instant::now();
                    let is_over = sys::signals() > 1 || (sys::signals() > 0 && self.killed);
                    if is_over || progress.elapsed() >= self.limits.stall {
                        self.lose("stalled");
                    }
                }
                // TCP_USER_TIMEOUT counts from what was last acknowledged, and may be the first to notice.
                Err(error) if error.kind() == ErrorKind::TimedOut => self.lose("stalled"),
                Err(_) => self.lose("gone"),
            }
            if self.looked.elapsed() >= TICK {
                self.look();
            }
        }
        self.stream.clear();
    }

    fn log(&self, happening: &str, values: std::fmt::Arguments) {
        let (peer, pid) = (&self.client.peer, self.child.pid);
        log::line(format_args!("{happening} peer={peer} pid={pid} {values}"));
    }
}
