//! The one loop: everything that can happen to a running command's stream, and to its command, happens here.
//!
//! The connection's thread waits on the channel for what the readers have read, encodes it and writes all that is ready in one write. A
//! slow client slows the command down, since the channel is bounded. On every turn it looks, at most once a tick, at what else can end
//! a command: the client, the leader's exit, time, and the server's own end. The way not taken, a thread for each of these, costs more
//! per run than the spawn and needs locks where this needs none.

use crate::child::{Child, Feed, Piece};
use crate::log::Line;
use crate::output::{COMMENT, Encoder, Source, Status};
use crate::response::Format;
use crate::sys;
use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

/// How often a silent stream looks around, and the longest that a write blocks in one call.
pub const TICK: Duration = Duration::from_millis(200);

/// What a command left running may pause for before the stream ends.
const QUIET: Duration = Duration::from_millis(250);
/// After SIGKILL the pipes end at once, unless somebody outside the group holds them.
const AFTER_KILL: Duration = Duration::from_millis(100);
/// How long content that goes on coming after the command's end is waited for.
const CONTENT_REST: Duration = Duration::from_secs(1);
/// So much of a piece is encoded before what is encoded is sent: a byte can become six.
const SLICE: usize = 32 << 10;
/// What is ready is sent in one write, once it is about this long.
const BATCH: usize = 64 << 10;

/// The options that bound a command's life.
pub struct Limits {
    pub timeout: Option<Duration>,
    pub grace: Duration,
    pub heartbeat: Duration,
    pub stall: Duration,
    pub verbose: bool,
}

/// Where a command's output goes.
pub struct Client<'a> {
    pub socket: &'a TcpStream,
    pub peer: &'a str,
    pub format: Format,
}

/// How a run ended, for the connection.
pub struct Ended {
    /// Everything was written, `exit` included.
    pub complete: bool,
    pub feed: Option<Feed>,
}

/// Streams a command that was started, from `head` to the last chunk, and sees to its end.
pub fn stream(child: Child, client: &Client, limits: &Limits, head: Vec<u8>) -> Ended {
    let now = Instant::now();
    let mut run = Run {
        child,
        client,
        limits,
        frames: Frames::new(client.format, head),
        bytes: [0; 2],
        started: now,
        looked: now,
        active: now,
        heard: now,
        tick: TICK,
        half_closed: false,
        left: None,
        ending: None,
        news: None,
        exited: None,
        kill_at: None,
        stop_at: None,
    };
    let pid = run.child.pid();
    run.frames.event(|encoder, out| encoder.start(pid, out));
    run.send();
    run.turn_until_over();
    run.finish()
}

/// The stream of a command that could not be started: `err` and `exit`.
pub fn failed_stream(code: i32, why: &str, format: Format, head: Vec<u8>) -> Vec<u8> {
    let mut frames = Frames::new(format, head);
    frames.event(|encoder, out| {
        encoder.error(why, out);
        encoder.exit("failed", Status::Code(code), 0, [0, 0], out);
    });
    frames.end(Status::Code(code));
    frames.batch
}

/// Why the server ends a command.
#[derive(Clone, Copy, PartialEq)]
enum Ending {
    Left,
    Content,
    Timeout,
    Shutdown,
}

/// How a client is lost.
#[derive(Clone, Copy)]
enum Left {
    Gone,
    Stalled,
}

struct Run<'a> {
    child: Child,
    client: &'a Client<'a>,
    limits: &'a Limits,
    frames: Frames,
    /// Read so far from stdout and from stderr.
    bytes: [u64; 2],
    started: Instant,
    /// When it last looked around.
    looked: Instant,
    /// When something was last written, or would have been: silence counts from here.
    active: Instant,
    /// When output was last taken and passed on.
    heard: Instant,
    tick: Duration,
    /// The client has finished sending, or is gone: a write will tell.
    half_closed: bool,
    left: Option<Left>,
    ending: Option<Ending>,
    /// The words of an `err` event that is due.
    news: Option<&'static str>,
    /// When the leader was seen to have exited.
    exited: Option<Instant>,
    /// When the group gets SIGKILL.
    kill_at: Option<Instant>,
    /// When the readers are made to end.
    stop_at: Option<Instant>,
}

impl Run<'_> {
    /// Until both pipes have ended and the leader has exited.
    fn turn_until_over(&mut self) {
        let mut pipes_open = true;
        let mut nap = Duration::from_micros(20);
        while pipes_open || self.exited.is_none() {
            if pipes_open {
                match self.child.pieces.recv_timeout(self.patience()) {
                    Ok(piece) => self.take_all(piece),
                    Err(RecvTimeoutError::Timeout) => self.look(),
                    Err(RecvTimeoutError::Disconnected) => pipes_open = false,
                }
            } else if self.child.exited() {
                break;
            } else {
                // A leader exits right after its pipes have ended, or, having closed them, at any time.
                let patience = self.patience();
                thread::sleep(nap.min(patience));
                if nap >= patience {
                    self.look();
                }
                nap = (nap * 2).min(TICK);
            }
            if self.looked.elapsed() >= self.tick {
                self.look();
            }
            if let Some(why) = self.news.take() {
                self.frames.event(|encoder, out| encoder.error(why, out));
            }
            let silence = self.active.elapsed();
            let probe = self.half_closed && silence >= TICK.min(self.tick);
            if self.client.format.events
                && self.frames.is_empty()
                && (probe || silence >= self.limits.heartbeat)
            {
                self.frames.comment();
            }
            self.send();
        }
    }

    /// The outcome, last of all.
    fn finish(mut self) -> Ended {
        let status = self.child.reap();
        let how = match (self.ending, status) {
            (Some(Ending::Timeout), _) => "timeout",
            (Some(Ending::Shutdown), _) => "shutdown",
            (_, Status::Code(_)) => "exited",
            (_, Status::Signal(_)) => "killed",
        };
        let ms = self.started.elapsed().as_millis();
        for source in [Source::Stdout, Source::Stderr] {
            self.frames
                .event(|encoder, out| encoder.end_of(source, out));
        }
        let news = self.news.take();
        self.frames.event(|encoder, out| {
            if let Some(why) = news {
                encoder.error(why, out);
            }
            encoder.exit(how, status, ms, self.bytes, out);
        });
        self.frames.end(status);
        self.send();
        let how = match self.left {
            Some(Left::Gone) => "gone",
            Some(Left::Stalled) => "stalled",
            None => how,
        };
        let line = Line::new("exit")
            .value("peer", self.client.peer)
            .value("pid", self.child.pid())
            .value("out", how);
        let line = match status {
            Status::Code(code) => line.value("code", code),
            Status::Signal(signal) => line.value("signal", signal),
        };
        let [stdout, stderr] = self.bytes;
        line.value("ms", ms)
            .value("stdout_bytes", stdout)
            .value("stderr_bytes", stderr)
            .write();
        let complete = self.left.is_none();
        Ended {
            complete,
            feed: self.child.end_feed(if complete {
                CONTENT_REST
            } else {
                Duration::ZERO
            }),
        }
    }

    /// A piece, and those that are ready behind it, up to a batch: the loop has more to do than an endless output.
    fn take_all(&mut self, first: Piece) {
        let mut next = Some(first);
        while let Some((source, piece)) = next {
            self.bytes[source as usize] += piece.len() as u64;
            if self.limits.verbose {
                let line = Line::new(source.name())
                    .value("peer", self.client.peer)
                    .value("pid", self.child.pid());
                line.text("out", &piece).write();
            }
            let mut sent = false;
            for slice in piece.chunks(SLICE) {
                self.frames.piece(source, slice);
                if self.frames.batch.len() >= BATCH {
                    self.send();
                    sent = true;
                }
            }
            next = if sent {
                None
            } else {
                self.child.pieces.try_recv().ok()
            };
        }
        self.send();
        self.heard = Instant::now();
    }

    /// How long there is nothing to do unless output comes.
    fn patience(&self) -> Duration {
        let now = Instant::now();
        let undisturbed = self.ending.is_none() && self.stop_at.is_none();
        let exit_at = self
            .exited
            .filter(|_| undisturbed)
            .map(|exited| self.end_of_leftovers(exited));
        let timeout = self
            .limits
            .timeout
            .filter(|_| undisturbed && self.exited.is_none());
        let timeout_at = timeout.map(|timeout| self.started + timeout);
        let heartbeat_at = self
            .client
            .format
            .events
            .then_some(self.active + self.limits.heartbeat);
        let stop_at = self
            .stop_at
            .map(|at| at.max(now + Duration::from_millis(1)));
        let events = [
            Some(self.looked + self.tick),
            exit_at,
            timeout_at,
            heartbeat_at,
            self.kill_at,
            stop_at,
        ];
        let next = events.into_iter().flatten().min().unwrap_or(now);
        // A moment at least: what is due and stays due must not make the loop spin.
        next.saturating_duration_since(now)
            .max(Duration::from_micros(100))
    }

    /// Looks at all that can end a command but its output.
    fn look(&mut self) {
        let now = Instant::now();
        self.looked = now;
        self.tick = TICK;
        if self.left.is_none() {
            let state = sys::ready(self.client.socket, sys::POLLRDHUP);
            let closed = state & sys::POLLRDHUP != 0;
            if state & (sys::POLLERR | sys::POLLHUP) != 0 || (closed && !self.client.format.events)
            {
                self.leave(Left::Gone);
            }
            // The answer to the probe that follows is looked at soon.
            if closed && !self.half_closed {
                self.half_closed = true;
                self.tick = TICK / 10;
            }
        }
        if self.exited.is_none() && self.child.exited() {
            self.exited = Some(now);
        }
        if sys::signals() > 0 {
            self.end(Ending::Shutdown, Some("the server is shutting down"));
        }
        if self.exited.is_none() {
            if self.child.content_is_broken() {
                self.end(
                    Ending::Content,
                    Some("the request's content is malformed or breaks off"),
                );
            }
            if self
                .limits
                .timeout
                .is_some_and(|timeout| now >= self.started + timeout)
            {
                self.end(Ending::Timeout, Some("the command ran past --timeout"));
            }
        }
        let impatient = sys::signals() > 1 || self.kill_at.is_some_and(|at| now >= at);
        let over = self.ending.is_none()
            && self
                .exited
                .is_some_and(|exited| now >= self.end_of_leftovers(exited));
        if impatient || over {
            self.child.signal(sys::SIGKILL);
            self.kill_at = None;
            self.stop_at.get_or_insert(now + AFTER_KILL);
        }
        if self.stop_at.is_some_and(|at| now >= at) {
            self.child.stop_readers();
        }
    }

    /// Until when a command that has exited may have left something that still writes.
    fn end_of_leftovers(&self, exited: Instant) -> Instant {
        (exited.max(self.heard) + QUIET).min(exited + self.limits.grace)
    }

    /// Asks the group to end. The first reason counts.
    fn end(&mut self, ending: Ending, news: Option<&'static str>) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(ending);
        self.news = news;
        self.child.signal(sys::SIGTERM);
        // One that is stopped would not notice.
        self.child.signal(sys::SIGCONT);
        self.kill_at = Some(Instant::now() + self.limits.grace);
    }

    fn leave(&mut self, left: Left) {
        self.left = Some(left);
        self.end(Ending::Left, None);
    }

    /// Writes what the frames hold. What is read for a client that is gone is discarded, so that the command can end.
    fn send(&mut self) {
        let batch = self.frames.take();
        let mut rest = &batch[..];
        let mut progress = Instant::now();
        while !rest.is_empty() && self.left.is_none() {
            match (&*self.client.socket).write(rest) {
                Ok(length) => {
                    rest = &rest[length..];
                    progress = Instant::now();
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // TCP_USER_TIMEOUT counts from what was last acknowledged, and may be the first to notice.
                Err(error) if error.kind() == ErrorKind::TimedOut => self.leave(Left::Stalled),
                Err(_) => self.leave(Left::Gone),
            }
            if rest.is_empty() {
                break;
            }
            if progress.elapsed() >= self.limits.stall || self.must_abandon() {
                self.leave(Left::Stalled);
            }
            if self.looked.elapsed() >= TICK {
                // It is the client that pauses.
                self.heard = Instant::now();
                self.look();
            }
        }
        if !batch.is_empty() {
            self.active = Instant::now();
        }
        self.frames.give_back(batch);
    }

    /// Whether the server cannot wait any longer for a client that does not read.
    fn must_abandon(&self) -> bool {
        sys::signals() > 1
            || (sys::signals() > 0 && self.stop_at.is_some_and(|at| Instant::now() >= at))
    }
}

/// What goes to the client, framed: each batch is one chunk, or stands for itself where the connection's end is the end.
struct Frames {
    encoder: Encoder,
    format: Format,
    batch: Vec<u8>,
    /// Where the open chunk begins.
    chunk: Option<usize>,
}

/// A chunk's size is written last into a place kept for it (RFC 9112 section 7.1; leading zeros are allowed).
const CHUNK_SIZE_PLACE: &[u8] = b"00000\r\n";

impl Frames {
    /// `head` goes out with the first batch.
    fn new(format: Format, head: Vec<u8>) -> Frames {
        Frames {
            encoder: Encoder::default(),
            format,
            batch: head,
            chunk: None,
        }
    }

    fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    fn piece(&mut self, source: Source, bytes: &[u8]) {
        if self.format.events {
            self.event(|encoder, out| encoder.piece(source, bytes, out));
        } else {
            self.content().extend_from_slice(bytes);
        }
    }

    /// Adds events to an event stream; plain text has none.
    fn event(&mut self, encode: impl FnOnce(&mut Encoder, &mut Vec<u8>)) {
        if self.format.events {
            self.content();
            encode(&mut self.encoder, &mut self.batch);
        }
    }

    fn comment(&mut self) {
        self.content().extend_from_slice(COMMENT);
    }

    /// The last chunk, with the outcome as a trailer field of plain text.
    fn end(&mut self, status: Status) {
        self.close_chunk();
        if !self.format.chunked {
            return;
        }
        let trailer = match status {
            _ if self.format.events => String::new(),
            Status::Code(code) => format!("Exit-Code: {code}\r\n"),
            Status::Signal(signal) => format!("Exit-Signal: {signal}\r\n"),
        };
        self.batch
            .extend_from_slice(format!("0\r\n{trailer}\r\n").as_bytes());
    }

    /// The buffer, at a place where content may stand.
    fn content(&mut self) -> &mut Vec<u8> {
        if self.format.chunked && self.chunk.is_none() {
            self.chunk = Some(self.batch.len());
            self.batch.extend_from_slice(CHUNK_SIZE_PLACE);
        }
        &mut self.batch
    }

    fn close_chunk(&mut self) {
        let Some(start) = self.chunk.take() else {
            return;
        };
        let content = start + CHUNK_SIZE_PLACE.len();
        if self.batch.len() == content {
            // A chunk without content would be the last one.
            self.batch.truncate(start);
            return;
        }
        let size = format!("{:05x}", self.batch.len() - content);
        self.batch[start..start + size.len()].copy_from_slice(size.as_bytes());
        self.batch.extend_from_slice(b"\r\n");
    }

    fn take(&mut self) -> Vec<u8> {
        self.close_chunk();
        std::mem::take(&mut self.batch)
    }

    /// Keeps the room of a batch that was sent.
    fn give_back(&mut self, mut batch: Vec<u8>) {
        batch.clear();
        self.batch = batch;
    }
}
