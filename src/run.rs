//! One command's stream, from its `start` to its `exit`: everything that can happen to a running command and
//! to its client happens here.
//!
//! Threads read the command's pipes and feed it (`pipes`); the connection's thread takes what they have read
//! from a channel, encodes it and writes it. The channel is bounded, so a client that reads slowly slows the
//! command down. The command's life is [`Run::live`], from top to bottom; in each of its phases the connection's
//! thread goes on in turns, of a tick at the most, and looks after each at what ends that phase. Nothing a
//! command does to its pipes can hold this thread.

use crate::pipes::{self, Content, Message, TICK, is_passing};
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
/// Ticks without a word after which what a command left running is quiet, and its stream ends. They are counted,
/// since a clock would go on while the whole server is stopped for a moment.
const QUIET_TICKS: u32 = 3;
/// A leader that was sent SIGKILL is dead by then, or cannot be killed.
const KILL_TIME: Duration = Duration::from_secs(1);
/// The first wait for a leader to exit whose pipes have ended, as they do just before.
const FIRST_WAIT: Duration = Duration::from_micros(50);
/// How long a client that does not read can hold up the server's end.
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
/// time out after a tick, and sees to its end. `command` is its command line as the log has it. A command that
/// was not started is refused, before anything of the stream was sent. [`refusal::GONE`] is a client that did
/// not get all of it, `exit` included.
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
    let (sender, messages) = sync_channel(CHANNEL);
    let is_over = AtomicBool::new(false);
    // The sender stays here too, so that waiting for a message waits also where all readers have ended.
    let (sender, is_over) = (&sender, &is_over);
    let mut run = Run {
        child,
        socket,
        peer,
        limits,
        stream,
        messages,
        is_over,
        started,
        written: started,
        open_outputs: 2,
        quiet_turns: 0,
        starved: None,
        is_probed: false,
        lost: None,
    };
    log::line(format_args!("run peer={peer} pid={} command={command}", run.child.pid));
    let done = thread::scope(|scope| -> io::Result<bool> {
        // `spawn` would panic where no thread is to be had.
        let builder = || thread::Builder::new().stack_size(STACK);
        for (source, pipe) in pipes.outputs.into_iter().enumerate() {
            builder().spawn_scoped(scope, move || pipes::read(pipe, source, sender, is_over))?;
        }
        if let (Some(stdin), Some(content)) = (pipes.stdin, content) {
            builder().spawn_scoped(scope, || pipes::feed(content, stdin, sender, is_over))?;
        }
        let why_ended = run.live();
        Ok(run.finish(why_ended, place))
    });
    ensure(done.map_err(|_| refusal::BUSY.about("thread"))?, refusal::GONE)
}

struct Run<'a> {
    child: Child,
    socket: &'a TcpStream,
    peer: SocketAddr,
    limits: &'a Limits,
    stream: Stream,
    messages: Receiver<Message>,
    /// Tells the threads that what is not in the pipes by now is not waited for.
    is_over: &'a AtomicBool,
    started: Instant,
    /// When the client last took something: silence and a stall count from here.
    written: Instant,
    /// How many of stdout and stderr have not ended.
    open_outputs: u32,
    /// How many times nothing came since the command was last heard of.
    quiet_turns: u32,
    /// The command's input, where the request's content ended before its length did.
    starved: Option<ChildStdin>,
    /// Whether a comment was sent to a client that has half-closed.
    is_probed: bool,
    /// How the client was lost, by the log's word.
    lost: Option<&'static str>,
}

/// Why the server ends a command.
struct Cause {
    /// The word of `exit`, where it has one.
    out: Option<&'static str>,
    /// What the client is told, if it is there.
    why: &'static str,
}

impl Drop for Run<'_> {
    /// On every way out, also where a thread could not be started or this one panics, the threads end, and
    /// no command is left.
    fn drop(&mut self) {
        self.is_over.store(true, SeqCst);
        self.child.end();
    }
}

impl Run<'_> {
    /// A command's life until nothing more comes of it. Returns the word of `exit` for why it was ended.
    fn live(&mut self) -> Option<&'static str> {
        self.stream.start(self.child.pid, self.limits.heartbeat);
        let mut cause = None;
        while cause.is_none() && !self.child.has_exited() {
            cause = self.turn();
        }
        // What it left running in its group may still write for a moment.
        let exited = Instant::now();
        self.quiet_turns = 0;
        while cause.is_none()
            && self.open_outputs > 0
            && self.quiet_turns < QUIET_TICKS
            && exited.elapsed() < self.limits.grace
        {
            cause = self.turn();
        }
        if let Some(cause) = &cause {
            self.stream.error(cause.why);
            self.end_all();
        }
        sys::send_group(self.child.pid, sys::SIGKILL);
        // What was written until then is still read.
        self.is_over.store(true, SeqCst);
        let killed = Instant::now();
        while self.open_outputs > 0 || (!self.child.has_exited() && killed.elapsed() < KILL_TIME) {
            self.turn();
        }
        cause.and_then(|cause| cause.out)
    }

    /// Asks all that the command started to end, waits for it, and kills what is left.
    fn end_all(&mut self) {
        self.child.signal(sys::SIGTERM);
        let asked = Instant::now();
        while asked.elapsed() < self.limits.grace && !IS_URGENT.load(SeqCst) {
            // What has printed just now is alive. An open pipe says nothing: who has left the session may hold it.
            if self.quiet_turns > 0 && self.child.has_exited() && self.child.is_alone() {
                break;
            }
            self.turn();
        }
        self.child.signal(sys::SIGKILL);
    }

    /// Why the command is to end.
    fn cause(&self) -> Option<Cause> {
        let timeout = self.limits.timeout;
        let is_late = !timeout.is_zero() && self.started.elapsed() >= timeout;
        if self.lost.is_some() {
            // An empty text sends nothing.
            Some(Cause { out: None, why: "" })
        } else if self.starved.is_some() {
            Some(Cause { out: None, why: "the request's content broke off" })
        } else if sys::is_ending() {
            Some(Cause { out: Some("shutdown"), why: "the server is shutting down" })
        } else if is_late && !self.child.has_exited() {
            Some(Cause { out: Some("timeout"), why: "the command ran past --timeout" })
        } else {
            None
        }
    }

    /// Takes what comes, sends what there is, and looks after the client; a tick or two. Returns why the command
    /// is to end, if it is.
    fn turn(&mut self) -> Option<Cause> {
        // A client that does not take what there is keeps more from being read.
        if self.stream.unsent.is_empty() {
            self.receive();
        }
        self.send();
        self.look_at_client();
        self.cause()
    }

    /// Writes what there is, as far as the client takes it within a tick. For one that is lost it is thrown
    /// away, so that the command can end.
    fn send(&mut self) {
        if self.stream.unsent.is_empty() || self.lost.is_some() {
            return self.stream.unsent.clear();
        }
        let is_last = sys::is_ending() && self.is_over.load(SeqCst);
        let longest_stall = if is_last { LAST_STALL } else { self.limits.stall };
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

    /// Waits for a message, and encodes what it brings, and others that are there by then, for one write.
    fn receive(&mut self) {
        // Where nothing is to come, it is the leader's exit that is waited for: at first for a moment, then for
        // twice as long each turn; 2^11 such moments are a tick.
        let is_closed = self.open_outputs == 0;
        let wait = if is_closed { FIRST_WAIT * 2_u32.pow(self.quiet_turns.min(11)) } else { TICK };
        let mut next = self.messages.recv_timeout(wait.min(TICK)).ok();
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
                Message::Ended => self.open_outputs -= 1,
                Message::BrokeOff(stdin) => self.starved = Some(stdin),
            }
            let is_enough = self.stream.unsent.len() >= ENOUGH;
            next = if is_enough { None } else { self.messages.try_recv().ok() };
        }
    }

    fn look_at_client(&mut self) {
        let state = sys::poll_one(self.socket, POLLIN | POLLRDHUP, Duration::ZERO);
        let is_half_closed = state & POLLRDHUP != 0;
        if state & (POLLERR | POLLHUP) != 0 || (is_half_closed && !self.stream.is_events) {
            self.lost.get_or_insert("gone");
        }
        // A connection's end looks like a half-close. To a comment it answers with a reset, which a later
        // look sees.
        let is_in_doubt = is_half_closed && !self.is_probed;
        // Plain text has nothing to say. But where unread input fills the window, a client's end does not arrive
        // before something that was sent brings it out.
        let is_told = self.stream.is_events || state & POLLIN != 0;
        let is_due = is_told && self.written.elapsed() >= self.limits.heartbeat;
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
