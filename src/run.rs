//! One command's stream, from its `start` to its `exit`: everything that can happen to a running command and
//! to its client happens here.
//!
//! Threads read the command's pipes and feed it (`pipes`); the connection's thread takes what they have read
//! from a channel, encodes it and writes it. The channel is bounded, so a client that reads slowly slows the
//! command down. Once a tick the connection's thread looks at all that ends a command: the client, the
//! leader, the clock, and the server's own end. Nothing a command does to its pipes can hold this thread.

use crate::child::Child;
use crate::log::{self, quoted};
use crate::output::{SOURCES, Stream};
use crate::pipes::{self, Content, Message, TICK, is_passing};
use crate::policy::CommandLine;
use crate::refusal::{self, Refusal};
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, POLLRDHUP};
use std::io::{self, ErrorKind, Write};
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};
use std::{fs::File, net::SocketAddr, net::TcpStream, process::ExitStatus, thread};

/// Messages, one from each reader, of up to 32 KiB.
const CHANNEL: usize = 2;
/// Output that is encoded for one write. A byte may be six when it is encoded.
const BATCH: usize = 64 << 10;
/// What a command left running may pause for before the stream ends.
const QUIET: Duration = Duration::from_millis(250);
/// A leader that was sent SIGKILL is dead by then, or cannot be killed.
const KILL_TIME: Duration = Duration::from_secs(1);
/// The first wait for a leader to exit whose pipes have ended, as they do just before.
const FIRST_WAIT: Duration = Duration::from_micros(50);
/// Comments by which a half-close is told from a connection's end, before the heartbeat has to do.
const MOST_PROBES: u32 = 2;
/// How long a client that does not read can hold up the server's end.
const LAST_STALL: Duration = Duration::from_millis(700);
/// Of a thread that reads or feeds: its buffers are on the heap.
const STACK: usize = 64 << 10;
/// The `out` of a command whose exit status nobody knows.
const LEFT: &str = "left";

/// The options that bound commands.
pub struct Limits {
    /// Running at once.
    pub max_commands: usize,
    /// Zero is none.
    pub timeout: Duration,
    pub grace: Duration,
    pub heartbeat: Duration,
    pub stall: Duration,
    pub verbose: bool,
}

/// Commands that run.
pub static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// Whether the server's end waits for no command any longer.
pub static IS_URGENT: AtomicBool = AtomicBool::new(false);

/// Who gets the stream. The socket's reads and writes time out after a tick.
pub struct Client<'a> {
    pub socket: &'a TcpStream,
    pub peer: SocketAddr,
}

/// The right to run a command; free again when it is dropped.
struct Place;

impl Place {
    fn take(most: usize) -> Result<Place, Refusal> {
        let one_more = |running| if running < most { Some(running + 1) } else { None };
        let taken = RUNNING.fetch_update(SeqCst, SeqCst, one_more);
        taken.map(|_| Place).map_err(|_| refusal::BUSY.about("place for one more command"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, SeqCst);
    }
}

/// Starts a command, feeds it `content`, if it is to have any, streams it, and sees to its end. Returns
/// whether the client got all of it, `exit` included. A command that was not started is refused, before
/// anything of the stream was sent.
pub fn run(
    command: &CommandLine,
    content: Option<Content>,
    client: &Client,
    limits: &Limits,
    stream: Stream,
) -> Result<bool, Refusal> {
    let place = Place::take(limits.max_commands)?;
    let (child, pipes) = Child::start(&command.words, content.is_some())?;
    let (sender, messages) = sync_channel(CHANNEL);
    let is_over = AtomicBool::new(false);
    let (sender, is_over) = (&sender, &is_over);
    thread::scope(|scope| {
        let start_threads = || -> io::Result<()> {
            // `spawn` would panic where no thread is to be had.
            let builder = || thread::Builder::new().stack_size(STACK);
            for (source, pipe) in pipes.outputs.into_iter().enumerate() {
                let read = move || pipes::read(pipe, source, sender, is_over);
                builder().spawn_scoped(scope, read)?;
            }
            if let (Some(stdin), Some(content)) = (pipes.stdin, content) {
                let feed = move || pipes::feed(content, stdin, sender, is_over);
                builder().spawn_scoped(scope, feed)?;
            }
            Ok(())
        };
        if start_threads().is_err() {
            // Ends those that were started. The command is killed as `child` is dropped.
            is_over.store(true, SeqCst);
            return Err(refusal::BUSY.about("thread"));
        }
        let text = log::quoted_as_sent(&command.text, &command.words.join(&b' '));
        let (peer, pid) = (client.peer, child.pid);
        log::line(format_args!("run peer={peer} pid={pid} command={text}"));
        let now = Instant::now();
        let mut run = Run {
            child,
            client,
            limits,
            stream,
            phase: Phase::Running,
            cause: None,
            lost: None,
            open_outputs: 2,
            broken_stdin: None,
            probes: 0,
            started: now,
            looked: now,
            written: now,
            heard: now,
            quiet_looks: 0,
        };
        run.stream.start(pid, limits.heartbeat);
        while !run.is_over() {
            run.send();
            run.receive(&messages);
            run.look();
            is_over.store(matches!(run.phase, Phase::Killed(_) | Phase::GivenUp), SeqCst);
        }
        is_over.store(true, SeqCst);
        // A reader that waits for room in the channel sees that nobody receives any more.
        drop(messages);
        Ok(run.finish(place))
    })
}

/// How far a command's life has come, and since when.
#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Running,
    /// The leader has exited by itself; what it left running in its group may still write for a moment.
    Leftovers(Instant),
    /// SIGTERM was sent to all.
    Asked(Instant),
    /// SIGKILL was sent to all. What was written until then is still read.
    Killed(Instant),
    /// SIGKILL did not end the leader.
    GivenUp,
}

struct Run<'a> {
    child: Child,
    client: &'a Client<'a>,
    limits: &'a Limits,
    stream: Stream,
    phase: Phase,
    /// Why the server ends the command, by the word of `exit`, where that has one.
    cause: Option<&'static str>,
    /// How the client was lost, by the log's word.
    lost: Option<&'static str>,
    /// How many of stdout and stderr have not ended.
    open_outputs: u32,
    /// The command's standard input, where its content broke off.
    broken_stdin: Option<File>,
    /// Comments sent to a client that has half-closed.
    probes: u32,
    started: Instant,
    /// When it last looked at what can end the command.
    looked: Instant,
    /// When the client last took something: silence and a stall count from here.
    written: Instant,
    /// When the command was last heard of, or was kept from being heard by its client.
    heard: Instant,
    /// Looks since then.
    quiet_looks: u32,
}

impl Run<'_> {
    /// Whether the command has ended, and all its output was taken.
    fn is_over(&self) -> bool {
        let has_ended = match self.phase {
            Phase::Running | Phase::Asked(_) => false,
            Phase::Killed(_) => self.child.has_exited(),
            Phase::Leftovers(_) | Phase::GivenUp => true,
        };
        has_ended && self.open_outputs == 0
    }

    /// Waits for messages, a tick at the most, and encodes what they bring, up to a batch.
    fn receive(&mut self, messages: &Receiver<Message>) {
        // A client that does not take what there is keeps more from being read.
        if !self.stream.is_sent() {
            return;
        }
        // Where nothing is to come, it is the leader's exit that is waited for, at first for moments only.
        let is_closed = self.open_outputs == 0;
        let wait = if is_closed { self.heard.elapsed().clamp(FIRST_WAIT, TICK) } else { TICK };
        let (mut next, mut length) = (messages.recv_timeout(wait).ok(), 0);
        while let Some(message) = next {
            self.hear();
            match message {
                Message::Output(source, bytes) => {
                    length += bytes.len();
                    self.pass_on(source, &bytes);
                }
                Message::Ended => self.open_outputs -= 1,
                Message::BrokeOff(stdin) => {
                    self.broken_stdin = stdin;
                    self.end(None, "the request's content broke off");
                }
            }
            next = if length < BATCH { messages.try_recv().ok() } else { None };
        }
    }

    fn hear(&mut self) {
        self.heard = Instant::now();
        self.quiet_looks = 0;
    }

    fn pass_on(&mut self, source: usize, bytes: &[u8]) {
        if self.limits.verbose {
            let (name, peer, pid) = (SOURCES[source], self.client.peer, self.child.pid);
            log::line(format_args!("{name} peer={peer} pid={pid} out={}", quoted(bytes)));
        }
        self.stream.output(source, bytes);
    }

    /// Writes what there is, as far as the client takes it within a tick. For one that is lost it is thrown
    /// away, so that the command can end.
    fn send(&mut self) {
        let (mut socket, unsent) = (self.client.socket, self.stream.unsent());
        if !unsent.is_empty() && self.lost.is_none() {
            match socket.write(unsent) {
                Ok(length) => {
                    self.stream.forget(length);
                    self.written = Instant::now();
                }
                Err(error) if is_passing(&error) => {}
                // TCP_USER_TIMEOUT may be the first to notice a stall.
                Err(error) if error.kind() == ErrorKind::TimedOut => self.lose("stalled"),
                Err(_) => self.lose("gone"),
            }
        }
        if self.lost.is_some() {
            let length = self.stream.unsent().len();
            self.stream.forget(length);
        }
    }

    /// Looks at all that ends a command, once a tick; where its exit is all that is waited for, at that alone
    /// each time.
    fn look(&mut self) {
        let is_due = self.looked.elapsed() >= TICK;
        if is_due {
            self.looked = Instant::now();
            self.quiet_looks += 1;
            self.look_at_client();
            if sys::is_ending() {
                self.end(Some("shutdown"), "the server is shutting down");
            }
        }
        if is_due || self.open_outputs == 0 {
            self.look_at_command();
        }
    }

    fn look_at_client(&mut self) {
        let state = sys::poll_one(self.client.socket, POLLIN | POLLRDHUP, Duration::ZERO);
        let is_half_closed = state & POLLRDHUP != 0;
        let has_left = is_half_closed && !self.stream.is_events;
        let silence = self.written.elapsed();
        if self.lost.is_some() {
            // Nobody is there to be looked at.
        } else if has_left || state & (POLLERR | POLLHUP) != 0 {
            self.lose("gone");
        } else if !self.stream.is_sent() {
            // It is the client that pauses, not the command.
            self.hear();
            if silence >= self.longest_stall() {
                self.lose("stalled");
            }
        } else if is_half_closed && self.probes < MOST_PROBES {
            // A connection's end looks like a half-close. To a comment it answers with a reset, which the
            // next look sees.
            self.probes += 1;
            self.stream.comment();
        } else if silence >= self.limits.heartbeat {
            self.written = Instant::now();
            // Plain text has nothing to say, unless input that nobody reads could hide the client's end.
            if self.stream.is_events || state & POLLIN != 0 {
                self.stream.comment();
            }
        }
    }

    fn look_at_command(&mut self) {
        let (limits, has_exited) = (self.limits, self.child.has_exited());
        match self.phase {
            Phase::Running if has_exited => self.phase = Phase::Leftovers(Instant::now()),
            Phase::Running => {
                if !limits.timeout.is_zero() && self.started.elapsed() >= limits.timeout {
                    self.end(Some("timeout"), "the command ran past --timeout");
                }
            }
            Phase::Leftovers(since) => {
                // Where the whole server was stopped for a while, a look comes before what was missed.
                let is_sure = self.quiet_looks >= 3;
                let is_quiet = is_sure && since.max(self.heard).elapsed() >= QUIET;
                if is_quiet || since.elapsed() >= limits.grace {
                    self.child.kill_group();
                    self.phase = Phase::Killed(Instant::now());
                }
            }
            Phase::Asked(since) => {
                let is_late = since.elapsed() >= limits.grace || IS_URGENT.load(SeqCst);
                if is_late {
                    self.child.signal(sys::SIGKILL);
                }
                // Who has left the session may still hold a pipe of a command that has ended.
                if is_late || (has_exited && self.child.is_alone()) {
                    self.phase = Phase::Killed(Instant::now());
                }
            }
            Phase::Killed(since) => {
                if !has_exited && since.elapsed() >= KILL_TIME {
                    self.stream.error("this server cannot kill the command, which goes on");
                    self.phase = Phase::GivenUp;
                }
            }
            Phase::GivenUp => {}
        }
    }

    /// Asks the command to end, and tells the client why. The first reason counts.
    fn end(&mut self, cause: Option<&'static str>, why: &str) {
        if matches!(self.phase, Phase::Running | Phase::Leftovers(_)) {
            self.phase = Phase::Asked(Instant::now());
            self.cause = cause;
            self.child.signal(sys::SIGTERM);
            self.stream.error(why);
        }
    }

    fn lose(&mut self, how: &'static str) {
        self.lost = Some(how);
        self.end(None, "");
    }

    /// How long the client may take nothing.
    fn longest_stall(&self) -> Duration {
        match self.phase {
            Phase::Running | Phase::Asked(_) => self.limits.stall,
            _ if sys::is_ending() => LAST_STALL,
            _ => self.limits.stall,
        }
    }

    /// Reaps the command and frees its place; sends the outcome, last of all, and logs it. Returns whether
    /// the client got it.
    fn finish(mut self, place: Place) -> bool {
        let ms = self.started.elapsed().as_millis();
        let mut status = None;
        if self.phase != Phase::GivenUp {
            status = self.child.reap().ok();
        }
        drop(place);
        let out = match status {
            None => LEFT,
            Some(status) => self.cause.unwrap_or(how_it_ended(status)),
        };
        self.stream.exit(out, status, ms);
        while !self.stream.is_sent() {
            self.send();
            if self.looked.elapsed() >= TICK {
                self.looked = Instant::now();
                self.look_at_client();
            }
        }
        let logged = if out == LEFT { LEFT } else { self.lost.unwrap_or(out) };
        self.log_exit(logged, status, ms);
        if self.phase == Phase::GivenUp {
            self.child.abandon();
        }
        self.lost.is_none()
    }

    fn log_exit(&self, out: &str, status: Option<ExitStatus>, ms: u128) {
        let number = match status.map(|status| (status.code(), status.signal())) {
            Some((Some(code), _)) => format!(" code={code}"),
            Some((None, signal)) => format!(" signal={}", signal.unwrap_or(0)),
            None => String::new(),
        };
        let ([stdout, stderr], peer, pid) = (self.stream.bytes, self.client.peer, self.child.pid);
        let bytes = format!("stdout_bytes={stdout} stderr_bytes={stderr}");
        log::line(format_args!("exit peer={peer} pid={pid} out={out}{number} ms={ms} {bytes}"));
    }
}

fn how_it_ended(status: ExitStatus) -> &'static str {
    if status.signal().is_some() { "killed" } else { "exited" }
}
