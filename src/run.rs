//! One command's stream, from its `start` to its `exit`: everything that can happen to a running command and
//! to its client happens here.
//!
//! Threads read the command's pipes and feed it (`pipes`); the connection's thread takes what they have read
//! from a channel, encodes it and writes it. The channel is bounded, so a client that reads slowly slows the
//! command down. Once a tick the connection's thread looks at all that ends a command: the client, the
//! leader, the clock, and the server's own end. Nothing a command does to its pipes can hold this thread.

use crate::child::{Child, Pipes};
use crate::log::{self, quoted};
use crate::output::{Outcome, Source, Stream};
use crate::pipes::{self, Content, Message, TICK, is_passing};
use crate::refusal::Refusal;
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, POLLRDHUP};
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

/// Messages of up to 64 KiB, from each reader one.
const CHANNEL: usize = 1;
/// Output that is encoded for one write. A piece may be six times as long when it is encoded.
const BATCH: usize = 64 << 10;
/// What a command left running may pause for before the stream ends.
const QUIET: Duration = Duration::from_millis(250);
/// A leader that was sent SIGKILL is dead by then, or cannot be killed.
const KILL_TIME: Duration = Duration::from_secs(1);
/// The first wait for a leader to exit whose pipes have ended, as they do just before.
const FIRST_WAIT: Duration = Duration::from_micros(50);
/// Comments by which a half-close is told from a connection's end, before the heartbeat has to do.
const PROBES: u32 = 2;
/// How long a client that does not read can hold up the server's end.
const LAST_STALL: Duration = Duration::from_millis(300);
/// The `out` of a command that has no exit status.
const LEFT: &str = "left";
/// Of a thread that reads or feeds: its buffers are on the heap.
const STACK: usize = 64 << 10;

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

/// What all runs have in common: their limits, their places, and how the server's end stands.
pub struct Commands {
    pub limits: Limits,
    running: AtomicUsize,
    end: AtomicU8,
}

/// The server's end, as it goes on.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
pub enum End {
    NotYet = 0,
    /// Every command is being asked to end.
    Asked = 1,
    /// Nobody waits any longer.
    AtOnce = 2,
}

/// The right to run one command; free again when it is dropped.
pub struct Place<'a>(&'a Commands);

impl Commands {
    pub fn new(limits: Limits) -> Commands {
        Commands { limits, running: AtomicUsize::new(0), end: AtomicU8::new(End::NotYet as u8) }
    }

    /// A place for a command, if there is one.
    pub fn place(&self) -> Option<Place<'_>> {
        let most = self.limits.max_commands;
        let one_more = |running| {
            if running < most { Some(running + 1) } else { None }
        };
        let taken = self.running.fetch_update(SeqCst, SeqCst, one_more);
        if taken.is_ok() { Some(Place(self)) } else { None }
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.running.load(SeqCst)
    }

    /// Tells all runs of the server's end.
    pub fn end(&self, end: End) {
        self.end.store(end as u8, SeqCst);
    }

    /// Whether the server's end has come that far.
    pub fn is_ending(&self, end: End) -> bool {
        self.end.load(SeqCst) >= end as u8
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, SeqCst);
    }
}

/// Who gets the stream. The socket's writes time out after a tick.
pub struct Client<'a> {
    pub socket: &'a TcpStream,
    pub peer: SocketAddr,
}

/// A command that was started, and what belongs to its stream.
pub struct Started<'a> {
    pub child: Child,
    pub pipes: Pipes,
    pub place: Place<'a>,
    /// As it was asked for.
    pub text: &'a [u8],
    /// What is to be fed, if anything.
    pub content: Content<'a>,
    /// Goes out with the first event.
    pub head: Vec<u8>,
    pub stream: Stream,
    pub is_events: bool,
}

/// Streams a command, feeds it, and sees to its end. Returns whether the client got all of it, `exit`
/// included; or, before anything was sent, that there is no thread to be had.
pub fn run(started: Started, client: &Client, commands: &Commands) -> Result<bool, Refusal> {
    let Started { child, pipes, place, text, content, head, stream, is_events } = started;
    let (sender, messages) = sync_channel(CHANNEL);
    let is_over = AtomicBool::new(false);
    let (peer, pid) = (client.peer, child.pid);
    thread::scope(|scope| {
        let threads = start_threads(scope, pipes, &content, &sender, &is_over);
        if threads.is_err() {
            // Those that were started end by it; the child is killed as it is dropped.
            is_over.store(true, SeqCst);
            return Err(Refusal::Busy("thread"));
        }
        log::line(format_args!("run peer={peer} pid={pid} command={}", quoted(text)));
        let now = Instant::now();
        let mut run = Run {
            child,
            client,
            commands,
            stream,
            is_events,
            batch: head,
            sent: 0,
            phase: Phase::Running,
            why: None,
            loss: None,
            open_outputs: 2,
            outputs_ended: now,
            stdin: None,
            started: now,
            looked: now,
            written: now,
            heard: now,
            probes: 0,
        };
        run.stream.start(pid, commands.limits.heartbeat);
        run.send();
        while !run.is_over() {
            run.receive(&messages);
            run.send();
            run.look(&is_over);
        }
        is_over.store(true, SeqCst);
        // A reader that waits for room in the channel sees that nobody receives any more.
        drop(messages);
        Ok(run.finish(place))
    })
}

fn start_threads<'scope>(
    scope: &'scope Scope<'scope, '_>,
    pipes: Pipes,
    content: &'scope Content,
    run: &SyncSender<Message>,
    is_over: &'scope AtomicBool,
) -> io::Result<()> {
    // `spawn` would panic where no thread is to be had.
    let builder = || thread::Builder::new().stack_size(STACK);
    let Pipes { stdin, stdout, stderr } = pipes;
    let sender = run.clone();
    let read_stdout = move || pipes::read(stdout, Source::Stdout, &sender, is_over);
    builder().spawn_scoped(scope, read_stdout)?;
    let sender = run.clone();
    let read_stderr = move || pipes::read(stderr, Source::Stderr, &sender, is_over);
    builder().spawn_scoped(scope, read_stderr)?;
    if let Some(stdin) = stdin {
        let sender = run.clone();
        let feed = move || pipes::feed(content, stdin, &sender, is_over);
        builder().spawn_scoped(scope, feed)?;
    }
    Ok(())
}

/// How far a command's life has come. Each phase but the first knows when it began.
#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Running,
    /// The leader has exited by itself; what it left running in its group may still write for a moment.
    Leftovers(Instant),
    /// SIGTERM was sent to all.
    Asked(Instant),
    /// SIGKILL was sent to all. Output is read only as far as it has been written.
    Killed(Instant),
    /// SIGKILL did not end the leader.
    GivenUp,
}

/// Why the server ends a command.
#[derive(Clone, Copy, PartialEq)]
enum Why {
    ClientLost,
    ContentBrokeOff,
    Timeout,
    Shutdown,
}

/// How the client was lost.
#[derive(Clone, Copy, PartialEq)]
enum Loss {
    Gone,
    Stalled,
}

struct Run<'a> {
    child: Child,
    client: &'a Client<'a>,
    commands: &'a Commands,
    stream: Stream,
    is_events: bool,
    /// Bytes for the client, of which so many were sent.
    batch: Vec<u8>,
    sent: usize,
    phase: Phase,
    why: Option<Why>,
    loss: Option<Loss>,
    /// How many of stdout and stderr have not ended.
    open_outputs: u32,
    /// When the last of them did.
    outputs_ended: Instant,
    /// The command's standard input, where its content broke off.
    stdin: Option<std::process::ChildStdin>,
    started: Instant,
    /// When it was last looked around.
    looked: Instant,
    /// When the client last took something: silence and a stall count from here.
    written: Instant,
    /// When there was last something to send.
    heard: Instant,
    /// Comments sent to a client that has half-closed.
    probes: u32,
}

impl Run<'_> {
    /// Whether the command has ended, with all that counts as its own, and all its output was taken.
    fn is_over(&self) -> bool {
        let has_ended = match self.phase {
            Phase::Running => false,
            Phase::Leftovers(_) => true,
            Phase::Asked(_) => false,
            Phase::Killed(_) => self.child.has_exited(),
            Phase::GivenUp => true,
        };
        has_ended && self.open_outputs == 0
    }

    /// Waits for messages, a tick at the most, and encodes what they bring, up to a batch.
    fn receive(&mut self, messages: &Receiver<Message>) {
        // A client that does not take what there is keeps more from being read.
        if !self.batch.is_empty() {
            return;
        }
        let mut message = messages.recv_timeout(self.wait()).ok();
        let mut length = 0;
        while let Some(next) = message {
            match next {
                Message::Output(source, bytes) => {
                    length += bytes.len();
                    self.pass_on(source, &bytes);
                }
                Message::Ended => {
                    self.open_outputs -= 1;
                    self.outputs_ended = Instant::now();
                }
                Message::BrokeOff(stdin) => {
                    self.stdin = stdin;
                    self.end(Why::ContentBrokeOff);
                }
            }
            message = if length < BATCH { messages.try_recv().ok() } else { None };
        }
    }

    /// How long to wait for a message. Where none is to come, it is the leader's exit that is waited for, at
    /// first only for moments.
    fn wait(&self) -> Duration {
        if self.open_outputs > 0 {
            return TICK;
        }
        self.outputs_ended.elapsed().clamp(FIRST_WAIT, TICK)
    }

    fn pass_on(&mut self, source: Source, bytes: &[u8]) {
        self.heard = Instant::now();
        if self.commands.limits.verbose {
            let (peer, pid, name) = (self.client.peer, self.child.pid, source.name());
            log::line(format_args!("{name} peer={peer} pid={pid} out={}", quoted(bytes)));
        }
        self.stream.output(source, bytes);
    }

    /// Writes what there is, as far as the client takes it within a tick. For one that is lost it is thrown
    /// away, so that the command can end.
    fn send(&mut self) {
        self.stream.take_content(&mut self.batch);
        if self.loss.is_none() && !self.batch.is_empty() {
            let mut socket = self.client.socket;
            match socket.write(&self.batch[self.sent..]) {
                Ok(length) => {
                    self.sent += length;
                    self.written = Instant::now();
                }
                Err(error) if is_passing(&error) => {}
                // TCP_USER_TIMEOUT may be the first to notice a stall.
                Err(error) if error.kind() == ErrorKind::TimedOut => self.lose(Loss::Stalled),
                Err(_) => self.lose(Loss::Gone),
            }
        }
        if self.loss.is_some() || self.sent == self.batch.len() {
            self.batch.clear();
            self.sent = 0;
        }
    }

    /// Once a tick, looks at all that ends a command; more often only whether the leader has exited, where
    /// that is all that is waited for.
    fn look(&mut self, is_over: &AtomicBool) {
        let is_due = self.looked.elapsed() >= TICK;
        if is_due {
            self.looked = Instant::now();
            self.look_at_client();
            self.look_at_server();
        }
        if is_due || self.open_outputs == 0 {
            self.look_at_command();
        }
        if matches!(self.phase, Phase::Killed(_) | Phase::GivenUp) {
            is_over.store(true, SeqCst);
        }
    }

    fn look_at_client(&mut self) {
        if self.loss.is_some() {
            return;
        }
        let state = sys::poll_one(self.client.socket, POLLIN | POLLRDHUP, Duration::ZERO);
        let is_half_closed = state & POLLRDHUP != 0;
        let has_left = is_half_closed && !self.is_events;
        if state & (POLLERR | POLLHUP) != 0 || has_left {
            return self.lose(Loss::Gone);
        }
        let silence = self.written.elapsed();
        if !self.batch.is_empty() {
            // It is the client that pauses, not the output.
            self.heard = Instant::now();
            if silence >= self.longest_stall() {
                self.lose(Loss::Stalled);
            }
            return;
        }
        // A connection's end looks like a half-close, or hides behind input that nobody reads. What is
        // written to it is answered with a reset, which the next look sees.
        if is_half_closed && self.probes < PROBES {
            self.probes += 1;
            self.stream.comment();
        } else if silence >= self.commands.limits.heartbeat {
            self.written = Instant::now();
            self.stream.comment();
            let has_unread_input = state & POLLIN != 0;
            if !self.is_events && has_unread_input {
                self.stream.zero(&mut self.batch);
            }
        }
    }

    fn look_at_server(&mut self) {
        if self.commands.is_ending(End::Asked) {
            self.end(Why::Shutdown);
        }
        if self.commands.is_ending(End::AtOnce) && matches!(self.phase, Phase::Asked(_)) {
            self.kill();
        }
    }

    fn look_at_command(&mut self) {
        let limits = &self.commands.limits;
        match self.phase {
            Phase::Running => {
                let age = self.started.elapsed();
                if self.child.has_exited() {
                    self.phase = Phase::Leftovers(Instant::now());
                } else if !limits.timeout.is_zero() && age >= limits.timeout {
                    self.end(Why::Timeout);
                }
            }
            Phase::Leftovers(since) => {
                let is_quiet = since.max(self.heard).elapsed() >= QUIET;
                if is_quiet || since.elapsed() >= limits.grace {
                    self.child.kill_group();
                    self.phase = Phase::Killed(Instant::now());
                }
            }
            Phase::Asked(since) => {
                if since.elapsed() >= limits.grace {
                    self.kill();
                } else if self.child.has_exited() && self.child.is_alone() {
                    // Nobody is left to be killed, though somebody who left the session may hold a pipe.
                    self.phase = Phase::Killed(Instant::now());
                }
            }
            Phase::Killed(since) => {
                if since.elapsed() >= KILL_TIME && !self.child.has_exited() {
                    self.stream.error("the command cannot be killed by this server, and goes on");
                    self.phase = Phase::GivenUp;
                }
            }
            Phase::GivenUp => {}
        }
    }

    /// Asks the command to end, and tells the client why. The first reason counts.
    fn end(&mut self, why: Why) {
        if matches!(self.phase, Phase::Asked(_) | Phase::Killed(_) | Phase::GivenUp) {
            return;
        }
        self.phase = Phase::Asked(Instant::now());
        self.why = Some(why);
        self.child.terminate();
        match why {
            Why::ClientLost => {}
            Why::ContentBrokeOff => self.stream.error("the request's content broke off"),
            Why::Timeout => self.stream.error("the command ran past --timeout"),
            Why::Shutdown => self.stream.error("the server is shutting down"),
        }
    }

    fn kill(&mut self) {
        self.child.kill();
        self.phase = Phase::Killed(Instant::now());
    }

    fn lose(&mut self, loss: Loss) {
        self.loss = Some(loss);
        self.end(Why::ClientLost);
    }

    /// How long the client may take nothing.
    fn longest_stall(&self) -> Duration {
        let is_waited_for = matches!(self.phase, Phase::Running | Phase::Asked(_));
        if self.commands.is_ending(End::Asked) && !is_waited_for {
            return LAST_STALL;
        }
        self.commands.limits.stall
    }

    /// Reaps the command and frees its place; sends the outcome, last of all, and logs it. Returns whether
    /// the client got it.
    fn finish(mut self, place: Place) -> bool {
        let mut outcome = self.outcome();
        drop(place);
        self.stream.exit(&mut outcome);
        self.stream.take_content(&mut self.batch);
        self.stream.take_last_chunk(&outcome, &mut self.batch);
        while !self.batch.is_empty() {
            self.send();
            if self.looked.elapsed() >= TICK {
                self.looked = Instant::now();
                self.look_at_client();
            }
        }
        match self.loss {
            Some(Loss::Gone) if outcome.out != LEFT => outcome.out = "gone",
            Some(Loss::Stalled) if outcome.out != LEFT => outcome.out = "stalled",
            _ => {}
        }
        log_exit(self.client.peer, self.child.pid, &outcome, "");
        if self.phase == Phase::GivenUp {
            self.child.abandon();
        }
        self.loss.is_none()
    }

    fn outcome(&mut self) -> Outcome {
        let ms = self.started.elapsed().as_millis();
        let mut outcome = Outcome::without_status(LEFT);
        if self.phase != Phase::GivenUp {
            match self.child.reap() {
                Ok(status) => outcome = Outcome::of(status),
                Err(_) => self.stream.error("nobody knows how the command ended"),
            }
        }
        match self.why {
            Some(Why::Timeout) if outcome.out != LEFT => outcome.out = "timeout",
            Some(Why::Shutdown) if outcome.out != LEFT => outcome.out = "shutdown",
            _ => {}
        }
        outcome.ms = ms;
        outcome
    }
}

/// The log line of a run's end. `why` says why a command was not started.
pub fn log_exit(peer: SocketAddr, pid: u32, outcome: &Outcome, why: &str) {
    let why =
        if why.is_empty() { String::new() } else { format!(" why={}", quoted(why.as_bytes())) };
    log::line(format_args!("exit peer={peer} pid={pid} {outcome}{why}"));
}
