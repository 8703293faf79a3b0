//! The one loop: everything that can happen to a running command's stream, and to its command, happens here.
//!
//! The connection's thread waits with `poll` for output, for content and for room to write. Output is read when all that was read before
//! has been sent, so a slow client slows the command down. On every turn it looks, at most once a tick, at what else can end a command:
//! the client, the leader's exit, time, and the server's own end. The way not taken, a thread that reads each pipe and a channel,
//! takes 110 us more for each run, a switch of threads more for each event, and needs ways to end a thread whose pipe something
//! outside the group keeps open.

use crate::child::Child;
use crate::listener::{Connection, TICK, is_passing};
use crate::log::{self, quoted};
use crate::request::{Answer, Content, ENDLESS, Result};
use crate::sys::{self, POLLIN, POLLOUT};
use crate::{output::SOURCES, output::Stream};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::prelude::*;
use std::time::{Duration, Instant};
use std::{ffi::c_short, fs::File, thread};

/// How often a client that may be gone is written to. With a tick to see the answer, that is told from one that has only finished
/// sending well within half a second.
const PROBE: Duration = Duration::from_millis(200);
/// What a command left running may pause for before the stream ends.
const QUIET: Duration = Duration::from_millis(250);
/// A silent stream must cost little, a loud one few calls: the buffer grows as long as reads fill it.
const FIRST_BUFFER: usize = 4 << 10;
const LARGEST_BUFFER: usize = 32 << 10;
/// The most that two pipes hold unless root says otherwise (pipe(7)). What an escaped process goes on writing is not waited for.
const MOST_IN_PIPES: u64 = 2 << 20;

/// The options that bound a command's life.
pub struct Limits {
    /// Zero is none.
    pub timeout: Duration,
    pub grace: Duration,
    pub heartbeat: Duration,
    pub stall: Duration,
    pub verbose: bool,
}

/// Streams a command, feeds it `content` if it has a standard input, and sees to its end. `stream` begins with the response's head.
/// `Gone` where not all was written, `exit` included.
pub fn run(
    child: Child,
    content: &mut Content<Connection>,
    limits: &Limits,
    stream: Stream,
) -> Result {
    let now = Instant::now();
    // Reading content must not wait: the loop does.
    content.input.get_mut().deadline = now;
    let mut run = Run {
        child,
        content,
        limits,
        stream,
        buffer: Vec::new(),
        started: now,
        looked: now,
        written: now,
        heard: now,
        lost: None,
        ending: None,
        exited: None,
        killed: None,
    };
    run.stream.start(run.child.pid);
    run.send();
    while run.is_open() || !run.has_exited() {
        run.turn();
    }
    run.finish()
}

struct Run<'a> {
    child: Child,
    content: &'a mut Content<Connection>,
    limits: &'a Limits,
    stream: Stream,
    buffer: Vec<u8>,
    started: Instant,
    /// When it last looked around.
    looked: Instant,
    /// When something was last to be written, or was: silence counts from here, and a stall.
    written: Instant,
    /// When output was last taken and passed on.
    heard: Instant,
    /// How the client was lost: `gone` or `stalled`.
    lost: Option<&'static str>,
    /// Why and since when the server ends the command. `exit` tells the word; where it is empty, how the leader ended.
    ending: Option<(&'static str, Instant)>,
    /// When the leader was seen to have exited.
    exited: Option<Instant>,
    /// When the group was killed, and how much output there may be altogether: who still holds the pipes a tick later is outside the
    /// group.
    killed: Option<(Instant, u64)>,
}

impl Run<'_> {
    /// Waits for what comes next, up to a tick, and does it.
    fn turn(&mut self) {
        let when = |is_so: bool, events: c_short| if is_so { events } else { 0 };
        let is_clear = self.stream.batch.is_empty();
        let (killed, most) = self.killed.unwrap_or((Instant::now(), u64::MAX));
        let is_draining = is_clear && killed.elapsed() >= TICK;
        let is_enough = self.stream.bytes.iter().sum::<u64>() > most;
        // A piece of content that is in the buffer is to be written, or to be passed over, else one is to be read.
        let is_feeding = self.content.goes_on();
        let has_piece = is_feeding && !self.content.input.buffer().is_empty();
        let is_due = is_draining || (has_piece && self.child.stdin.is_none());
        let mut wait = if is_due { Duration::ZERO } else { TICK };
        if !self.is_open() {
            // A leader exits right after its pipes have ended or, having closed them, at any time. `poll` waits no less than 1 ms.
            wait = self.heard.elapsed().clamp(Duration::from_micros(20), TICK);
            if wait < Duration::from_millis(1) {
                thread::sleep(wait);
            }
        }
        let fd = |pipe: &Option<File>| pipe.as_ref().map_or(-1, File::as_raw_fd);
        let reading = when(is_feeding && !has_piece, POLLIN);
        let socket = self.content.client().socket.as_raw_fd();
        let asked = [
            (fd(&self.child.outputs[0]), when(is_clear, POLLIN)),
            (fd(&self.child.outputs[1]), when(is_clear, POLLIN)),
            (fd(&self.child.stdin), when(has_piece, POLLOUT)),
            (socket, reading | when(!is_clear, POLLOUT)),
        ];
        let [stdout, stderr, stdin, _] = sys::poll_all(asked, wait);
        for (source, state) in [stdout, stderr].into_iter().enumerate() {
            if state != 0 && !is_enough {
                self.read(source);
            } else if is_draining {
                self.child.outputs[source] = None;
            }
        }
        if self.content.left != ENDLESS {
            self.feed(stdin != 0);
        }
        self.send();
        if self.looked.elapsed() >= TICK {
            self.look();
        }
    }

    fn is_open(&self) -> bool {
        self.child.outputs.iter().any(Option::is_some)
    }

    fn has_exited(&mut self) -> bool {
        if self.exited.is_none() && sys::exited_noreap(self.child.pid) {
            self.exited = Some(Instant::now());
        }
        self.exited.is_some()
    }

    /// Encodes what there is to read from a source, or notes its end.
    fn read(&mut self, source: usize) {
        if self.buffer.is_empty() {
            self.buffer.resize(FIRST_BUFFER, 0);
        }
        let output = self.child.outputs[source].as_mut();
        let length = output.map_or(0, |it| it.read(&mut self.buffer).unwrap_or(0));
        self.heard = Instant::now();
        if length == 0 {
            self.child.outputs[source] = None;
            return;
        }
        self.written = self.heard;
        let piece = &self.buffer[..length];
        if self.limits.verbose {
            self.log(SOURCES[source], format_args!("out={}", quoted(piece)));
        }
        self.stream.piece(source, piece);
        if length == self.buffer.len() {
            self.buffer.resize((length * 4).min(LARGEST_BUFFER), 0);
        }
    }

    /// Writes content to the command as it comes. What a command that has closed its input does not want is read all the same, since the
    /// next request comes after it. Content that has no proper end keeps the pipe open: a command is not to take the part for the whole.
    fn feed(&mut self, has_room: bool) {
        match self.content.piece() {
            Err(Answer::Late) => {}
            Err(_) => self.content.left = ENDLESS,
            Ok(piece) => {
                let written = match &mut self.child.stdin {
                    None => Ok(piece.len()),
                    Some(_) if !has_room => Ok(0),
                    // There is room for a piece, which then is written whole.
                    Some(pipe) => pipe.write(piece),
                };
                match written {
                    Ok(length) => self.content.consume(length),
                    Err(_) => self.child.stdin = None,
                }
            }
        }
        if self.content.is_at_end() {
            self.child.stdin = None;
        }
    }

    /// The outcome, last of all.
    fn finish(mut self) -> Result {
        let status = self.child.reap();
        let (how, number) = match status.code() {
            Some(code) => ("exited", format!("code={code}")),
            None => ("killed", format!("signal={}", status.signal().unwrap_or(0))),
        };
        let ending = self.ending.map(|it| it.0).filter(|it| !it.is_empty());
        let how = ending.unwrap_or(how);
        let ms = self.started.elapsed().as_millis();
        self.stream.exit(how, status, ms);
        self.send();
        while !self.stream.batch.is_empty() {
            self.turn();
        }
        let (how, [stdout, stderr]) = (self.lost.unwrap_or(how), self.stream.bytes);
        let bytes = format!("stdout_bytes={stdout} stderr_bytes={stderr}");
        self.log("exit", format_args!("out={how} {number} ms={ms} {bytes}"));
        self.lost.map_or(Ok(()), |_| Err(Answer::Gone))
    }

    /// Looks at all that can end a command but its output.
    fn look(&mut self) {
        let now = Instant::now();
        let (limits, signals) = (self.limits, sys::signals());
        self.looked = now;
        if self.lost.is_none() {
            let events = sys::POLLRDHUP | POLLIN;
            let state = sys::ready(&self.content.client().socket, events, Duration::ZERO);
            let half_closed = state & sys::POLLRDHUP != 0;
            // A connection's end looks like a half-close, or hides behind content that is not read. A comment brings it out: it is
            // answered with a reset, which the next look sees.
            let unsure = half_closed || (state != 0 && self.content.goes_on());
            let longest = if unsure { PROBE } else { limits.heartbeat };
            let silence = now - self.written;
            let is_ending = signals > 1 || (signals > 0 && self.killed.is_some());
            if state & sys::POLLGONE != 0 || (half_closed && !self.stream.events) {
                self.lose("gone");
            } else if !self.stream.batch.is_empty() {
                // It is the client that pauses, not the output.
                self.heard = now;
                if is_ending || silence >= limits.stall {
                    self.lose("stalled");
                }
            } else if silence >= longest {
                self.stream.comment();
                self.written = now;
            }
        }
        if self.child.is_reaped {
            return;
        }
        let is_running = !self.has_exited();
        if signals > 0 {
            self.end("shutdown", "the server is shutting down");
        } else if is_running && self.content.left == ENDLESS {
            self.end("", "the request's content is malformed or breaks off");
        } else if is_running && !limits.timeout.is_zero() && now - self.started >= limits.timeout {
            self.end("timeout", "the command ran past --timeout");
        }
        let is_late = |since: Instant| now - since >= limits.grace;
        let is_over = match (self.ending, self.exited) {
            (Some((_, asked)), _) => is_late(asked),
            (None, Some(exited)) => is_late(exited) || now - exited.max(self.heard) >= QUIET,
            (None, None) => false,
        };
        if self.killed.is_none() && (is_over || signals > 1) {
            self.child.signal(sys::SIGKILL);
            let most = self.stream.bytes.iter().sum::<u64>() + MOST_IN_PIPES;
            self.killed = Some((now, most));
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

    /// Writes what the stream holds, as far as the client takes it. For one that is lost it is discarded, so that the command can end.
    fn send(&mut self) {
        while self.lost.is_none() && !self.stream.ready().is_empty() {
            let mut socket = &*self.content.client().socket;
            match socket.write(self.stream.ready()) {
                Ok(length) => {
                    self.stream.sent(length);
                    self.written = Instant::now();
                }
                Err(error) if is_passing(&error) => return,
                // TCP_USER_TIMEOUT counts from what was last acknowledged, and may be the first to notice.
                Err(error) if error.kind() == ErrorKind::TimedOut => self.lose("stalled"),
                Err(_) => self.lose("gone"),
            }
        }
        let unsent = self.stream.ready().len();
        self.stream.sent(unsent);
    }

    fn log(&self, happening: &str, values: std::fmt::Arguments) {
        let (peer, pid) = (&self.content.client().peer, self.child.pid);
        log::line(format_args!("{happening} peer={peer} pid={pid} {values}"));
    }
}
