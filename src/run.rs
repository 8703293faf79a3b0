//! One command's stream, from its `start` to its `exit`: everything that can happen to a running command and
//! to its client happens here.
//!
//! Threads read the command's pipes and feed it (`pipes`); the connection's thread takes what they have read
//! from a channel, encodes it and writes it. The channel is bounded, so a client that reads slowly slows the
//! command down. The command's life is [`Run::live`], from top to bottom. In each of its phases the connection's
//! thread goes on in turns; a turn waits for messages for a tick at the most, and for the client for another, so
//! nothing that a command does to its pipes can hold this thread.

use crate::pipes::{self, Content, Message, Shared, TICK, is_passing};
use crate::refusal::{self, Refusal, ensure};
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, POLLRDHUP};
use crate::{child::Child, log, log::quoted, output::SOURCES, output::Stream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};
use std::{io, io::ErrorKind, io::Write, os::unix::process::ExitStatusExt};
use std::{net::SocketAddr, net::TcpStream, process::ChildStdin, thread};

/// Messages, one from each reader, of up to 32 KiB.
const CHANNEL: usize = 2;
/// Encoded output, in bytes, to which no more messages are added: a byte of one may have become six.
const ENOUGH: usize = 64 << 10;
/// Turns without a message after which what a command left running is quiet, and its stream ends. They are counted,
/// since by the clock it would be quiet, too, when the whole server was stopped (SIGSTOP, a laptop's lid).
const QUIET_TURNS: u32 = 3;
/// A leader that was sent SIGKILL is dead by then, or cannot be killed.
const KILL_TIME: Duration = Duration::from_secs(1);
/// How long a client that takes nothing can hold up the server's end.
const LAST_STALL: Duration = Duration::from_millis(700);
/// Of a thread that reads or feeds: its buffers are on the heap.
const STACK: usize = 64 << 10;

/// What the options say about commands and their clients.
pub struct Limits {
    /// Commands that run at once.
    pub max_commands: usize,
    /// The longest life of a command; zero is none.
    pub timeout: Duration,
    /// Between SIGTERM and SIGKILL; also for what a command that has exited left running.
    pub grace: Duration,
    /// Of silence, before a comment is sent.
    pub heartbeat: Duration,
    /// The longest that a client may take nothing.
    pub stall: Duration,
    /// Output is logged too.
    pub verbose: bool,
}

/// Commands that run.
pub static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// Whether the server's end waits for no command any longer.
pub static IS_URGENT: AtomicBool = AtomicBool::new(false);

/// A command's place among those that run: free again when it is dropped.
struct Place;

impl Drop for Place {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, SeqCst);
    }
}

/// Starts a command, feeds it `content`, if it is to have any, streams it to `socket`, whose reads and writes
/// time out after a tick, and sees to its end. `command` is its command line as the log has it. It is refused
/// before anything of the stream was sent: where it was not started, or was killed at once since there were no
/// threads for its pipes. [`refusal::GONE`] is a client that did not get all of it, `exit` included.
pub fn run(
    command: &str,
    words: &[Vec<u8>],
    content: Option<Content>,
    socket: &TcpStream,
    peer: SocketAddr,
    limits: &Limits,
    stream: Stream,
) -> Result<(), Refusal> {
    let is_free = RUNNING.fetch_add(1, SeqCst) < limits.max_commands;
    let place = Place;
    ensure(is_free, refusal::BUSY.about("place for one more command"))?;
    let started = Instant::now();
    let (child, pipes) = Child::start(words, content.is_some())?;
    log::line(format_args!("run peer={peer} pid={} command={command}", child.pid));
    let (sender, messages) = sync_channel(CHANNEL);
    let (open_outputs, is_over) = (AtomicUsize::new(2), AtomicBool::new(false));
    let shared = &Shared { messages: sender, open_outputs, is_over };
    let mut run = Run {
        child,
        socket,
        peer,
        limits,
        stream,
        messages,
        shared,
        started,
        written: started,
        has_output: true,
        quiet_turns: 0,
        exit_wait: Duration::from_micros(25),
        starved: None,
        is_probed: false,
        lost: None,
    };
    let done = thread::scope(|scope| -> io::Result<bool> {
        // `spawn` would panic where no thread is to be had.
        let builder = || thread::Builder::new().stack_size(STACK);
        for (source, pipe) in pipes.outputs.into_iter().enumerate() {
            builder().spawn_scoped(scope, move || pipes::read(pipe, source, shared))?;
        }
        if let (Some(stdin), Some(content)) = (pipes.stdin, content) {
            builder().spawn_scoped(scope, || pipes::feed(content, stdin, shared))?;
        }
        let why_ended = run.live();
        // Takes the run, which therefore belongs to this closure, and is dropped on every way out of it, before the
        // scope waits for the threads. It tells them to end.
        Ok(run.finish(why_ended, place))
    });
    match done {
        Err(_) => Err(refusal::BUSY.about("thread")),
        Ok(is_complete) => ensure(is_complete, refusal::GONE),
    }
}

struct Run<'a> {
    child: Child,
    socket: &'a TcpStream,
    peer: SocketAddr,
    limits: &'a Limits,
    stream: Stream,
    messages: Receiver<Message>,
    shared: &'a Shared,
    started: Instant,
    /// When the client last took something: silence and a stall count from here.
    written: Instant,
    /// Not both of stdout and stderr have ended.
    has_output: bool,
    /// How many turns nothing has come for.
    quiet_turns: u32,
    /// The last wait for a leader to exit whose outputs have ended.
    exit_wait: Duration,
    /// The command's input, where the request's content ended before its length did.
    starved: Option<ChildStdin>,
    /// Whether a comment was sent to a client that has half-closed.
    is_probed: bool,
    /// How the client was lost, by the log's word.
    lost: Option<&'static str>,
}

/// Why the server ends a command.
struct Cause {
    /// The `out` of `exit`, where it has one for this.
    out: Option<&'static str>,
    /// What the client is told, if it is there.
    text: &'static str,
}

impl Drop for Run<'_> {
    /// On every way out, also where a thread could not be started or this one panics, the threads end, and
    /// no command is left.
    fn drop(&mut self) {
        self.shared.is_over.store(true, SeqCst);
        self.child.end();
    }
}

impl Run<'_> {
    /// A command's life, until nothing more comes of it. Returns the `out` of `exit`, where it was ended.
    fn live(&mut self) -> Option<&'static str> {
        self.stream.start(self.child.pid, self.limits.heartbeat);
        let cause = self.follow();
        if let Some(cause) = &cause {
            self.stream.error(cause.text);
            self.end_all();
        }
        sys::send_group(self.child.pid, sys::SIGKILL);
        // What it has printed until now is still read, and sent.
        self.shared.is_over.store(true, SeqCst);
        let killed = Instant::now();
        while self.has_output || (!self.child.has_exited() && killed.elapsed() < KILL_TIME) {
            self.turn();
        }
        cause.and_then(|cause| cause.out)
    }

    /// Streams the command until it ends by itself, or there is a cause to end it.
    fn follow(&mut self) -> Option<Cause> {
        let mut cause = None;
        while cause.is_none() && !self.child.has_exited() {
            cause = self.turn();
        }
        // What it left running in its group may print on, until that pauses.
        let exited = Instant::now();
        self.quiet_turns = 0;
        let is_quiet = |run: &Self| !run.has_output || run.quiet_turns >= QUIET_TURNS;
        while cause.is_none() && !is_quiet(self) && exited.elapsed() < self.limits.grace {
            cause = self.turn();
        }
        cause
    }

    /// Asks all that the command started to end, waits until it has, and kills what then is left.
    fn end_all(&mut self) {
        self.child.terminate();
        let asked = Instant::now();
        while asked.elapsed() < self.limits.grace && !IS_URGENT.load(SeqCst) {
            // What has just printed lives; only then is /proc read. (An open pipe says nothing: it may be held by who
            // has left the session.)
            if self.quiet_turns > 0 && self.child.has_exited() && self.child.is_dead() {
                return;
            }
            self.turn();
        }
        self.child.kill();
    }

    /// Why the command is to end.
    fn cause(&self) -> Option<Cause> {
        let timeout = self.limits.timeout;
        let is_late = !timeout.is_zero() && self.started.elapsed() >= timeout;
        if self.lost.is_some() {
            // Nobody is told.
            Some(Cause { out: None, text: "" })
        } else if self.starved.is_some() {
            Some(Cause { out: None, text: "the request's content broke off" })
        } else if sys::is_ending() {
            Some(Cause { out: Some("shutdown"), text: "the server is shutting down" })
        } else if is_late && !self.child.has_exited() {
            Some(Cause { out: Some("timeout"), text: "the command ran past --timeout" })
        } else {
            None
        }
    }

    /// Takes what comes, sends what there is, and looks after the client. Returns why the command is to end, if
    /// it is.
    fn turn(&mut self) -> Option<Cause> {
        // A client that does not take what there is keeps more from being read.
        if self.stream.unsent.is_empty() {
            self.receive();
        }
        self.send();
        self.look_at_client();
        self.cause()
    }

    /// Waits for a message, and encodes what it brings, and others that are there by then, for one write.
    fn receive(&mut self) {
        let mut wait = TICK;
        if !self.has_output {
            // The leader's exit is waited for, which mostly follows at once. Nothing tells of it.
            self.exit_wait = TICK.min(self.exit_wait * 2);
            wait = self.exit_wait;
        }
        let mut next = self.messages.recv_timeout(wait).ok();
        self.quiet_turns = if next.is_some() { 0 } else { self.quiet_turns + 1 };
        while let Some(message) = next {
            match message {
                Message::Output(source, bytes) => {
                    if self.limits.verbose {
                        let (peer, pid) = (self.peer, self.child.pid);
                        let (name, out) = (SOURCES[source], quoted(&bytes));
                        log::line(format_args!("{name} peer={peer} pid={pid} out={out}"));
                    }
                    self.stream.output(source, bytes);
                }
                Message::Ended => self.has_output = false,
                Message::BrokeOff(stdin) => self.starved = Some(stdin),
            }
            let is_enough = self.stream.unsent.len() >= ENOUGH;
            next = if is_enough { None } else { self.messages.try_recv().ok() };
        }
    }

    /// Writes what there is, as far as the client takes it within a tick. For one that is lost it is thrown
    /// away, so that the command can end.
    fn send(&mut self) {
        if self.stream.unsent.is_empty() || self.lost.is_some() {
            return self.stream.unsent.clear();
        }
        let is_servers_end = sys::is_ending() && self.shared.is_over.load(SeqCst);
        let longest_stall = if is_servers_end { LAST_STALL } else { self.limits.stall };
        match self.socket.write(&self.stream.unsent) {
            Ok(length) => {
                self.stream.unsent.drain(..length);
                self.written = Instant::now();
            }
            Err(error) if is_passing(&error) && self.written.elapsed() < longest_stall => {}
            // TCP_USER_TIMEOUT may be the first to notice a stall.
            Err(error) if is_passing(&error) || error.kind() == ErrorKind::TimedOut => {
                self.lost = Some("stalled");
            }
            Err(_) => self.lost = Some("gone"),
        }
    }

    /// Notices that the client has left, and sends a comment where that is due.
    fn look_at_client(&mut self) {
        let state = sys::poll_one(self.socket, POLLIN | POLLRDHUP, Duration::ZERO);
        let is_half_closed = state & POLLRDHUP != 0;
        let has_unread_input = state & POLLIN != 0;
        // Plain text has nothing by which to probe a half-closed client.
        if state & (POLLERR | POLLHUP) != 0 || (is_half_closed && !self.stream.is_events) {
            self.lost.get_or_insert("gone");
        }
        // Who closes the whole connection looks half-closed, too, until something is sent: that brings a reset, which
        // a later turn sees.
        let is_in_doubt = is_half_closed && !self.is_probed;
        // Plain text is silent by nature. But where unread input fills TCP's window, the client's end cannot arrive;
        // again what is sent brings a reset.
        let may_comment = self.stream.is_events || has_unread_input;
        let is_due = may_comment && self.written.elapsed() >= self.limits.heartbeat;
        if self.lost.is_none() && self.stream.unsent.is_empty() && (is_in_doubt || is_due) {
            self.is_probed = is_half_closed;
            self.stream.comment();
        }
    }

    /// Reaps the command and frees its place; sends the outcome, last of all, and logs it. Returns whether
    /// the client got it.
    fn finish(mut self, why_ended: Option<&'static str>, place: Place) -> bool {
        let status = self.child.reap();
        drop(place);
        let code = status.and_then(|status| status.code());
        let signal = status.and_then(|status| status.signal());
        let mut out = why_ended.unwrap_or(if signal.is_some() { "killed" } else { "exited" });
        if status.is_none() {
            out = "left";
            self.stream.error("this server cannot kill the command, which goes on");
        }
        let numbers = self.stream.exit(out, code, signal, self.started.elapsed().as_millis());
        while !self.stream.unsent.is_empty() {
            self.send();
        }
        // That the command was left matters more than that the client was lost.
        let logged = if status.is_some() { self.lost.unwrap_or(out) } else { out };
        let (peer, pid) = (self.peer, self.child.pid);
        log::line(format_args!("exit peer={peer} pid={pid} out={logged}{numbers}"));
        self.lost.is_none()
    }
}
