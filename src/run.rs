//! One command's stream, from its `start` to its `exit`: everything that can happen to a running
//! command and to its client happens here.
//!
//! Threads read the command's pipes and feed it (`pipes`); the connection's thread takes what they
//! have read from a channel, encodes it and writes it. The channel is bounded, so a client that
//! reads slowly slows the command down. The command's life is [`Run::live`], from top to bottom. In
//! each of its phases the connection's thread goes on in turns; a turn waits for messages for a
//! tick at the most, and for the client for another, so nothing that a command does to its pipes
//! can hold this thread.

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
/// Encoded output, in bytes, to which no more messages are added: a byte of one may have become
/// six.
const ENOUGH: usize = 64 << 10;
/// Turns without a message after which what a command left running is quiet, and its stream ends.
/// They are counted, since by the clock it would be quiet, too, when the whole server was stopped
/// (SIGSTOP, a laptop's lid).
const QUIET_TURNS: u32 = 3;
/// A leader that was sent SIGKILL is dead by then, or cannot be killed.
const KILL_TIME: Duration = Duration::from_secs(1);
/// Once both outputs have ended, the waits for the leader's exit are 0, 1, 2, … times this, up to a
/// tick.
const EXIT_WAIT: Duration = Duration::from_micros(50);
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

/// Whom a command is run for.
#[derive(Clone, Copy)]
pub struct Client<'a> {
    /// Its reads and writes time out after a tick.
    pub socket: &'a TcpStream,
    /// As `accept` gave it.
    pub peer: SocketAddr,
    pub limits: &'a Limits,
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

/// Starts a command, feeds it `content`, if it is to have any, streams it to the client, and sees
/// to its end. `command` is its command line as the log has it. It is refused before anything of
/// the stream was sent: where it was not started, or was killed at once since there were no threads
/// for its pipes. [`refusal::GONE`] is a client that did not get all of it, `exit` included.
pub fn run(
    command: &str,
    words: &[Vec<u8>],
    content: Option<Content>,
    client: Client,
    stream: Stream,
) -> Result<(), Refusal> {
    let is_free = RUNNING.fetch_add(1, SeqCst) < client.limits.max_commands;
    let place = Place;
    ensure(is_free, refusal::BUSY.about("place for one more command"))?;
    let started = Instant::now();
    let (child, outputs, stdin) = Child::start(words, content.is_some())?;
    log::line(format_args!("run peer={} pid={} command={command}", client.peer, child.pid));
    let (sender, messages) = sync_channel(CHANNEL);
    // One sender stays here: otherwise, once the readers have ended, recv_timeout would return at
    // once.
    let (sender, is_over) = (&sender, &AtomicBool::new(false));
    let mut run = Run {
        child,
        client,
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
    let done = thread::scope(|scope| -> io::Result<bool> {
        // `spawn` would panic where no thread is to be had.
        let builder = || thread::Builder::new().stack_size(STACK);
        for (source, pipe) in outputs.into_iter().enumerate() {
            builder().spawn_scoped(scope, move || pipes::read(pipe, source, sender, is_over))?;
        }
        if let (Some(stdin), Some(content)) = (stdin, content) {
            builder().spawn_scoped(scope, || pipes::feed(content, stdin, sender, is_over))?;
        }
        let why_ended = run.live();
        // `finish` takes the run by value, so the closure owns it. However the closure is left, by
        // `?`, a panic or its end, the run is dropped before the scope waits for the threads. Its
        // Drop tells them to end, and without its receiver none of them can wait in `send`.
        Ok(run.finish(why_ended, place))
    });
    ensure(done.map_err(|_| refusal::BUSY.about("thread"))?, refusal::GONE)
}

struct Run<'a> {
    child: Child,
    client: Client<'a>,
    stream: Stream,
    messages: Receiver<Message>,
    /// Tells the threads that what is not in the pipes by now is not waited for.
    is_over: &'a AtomicBool,
    started: Instant,
    /// When the client last took something: silence and a stall count from here.
    written: Instant,
    /// How many of stdout and stderr have not ended.
    open_outputs: u32,
    /// For how many turns no message has come.
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
    /// The `out` of `exit`, where it has one for this.
    out: Option<&'static str>,
    /// What the client is told, if it is there.
    text: &'static str,
}

impl Drop for Run<'_> {
    /// On every way out, also where a thread could not be started or this one panics, the threads
    /// end, and no command is left.
    fn drop(&mut self) {
        // In this order: a feeder that ends closes the command's input, which must not take the
        // part for the whole.
        self.child.end();
        self.is_over.store(true, SeqCst);
    }
}

impl Run<'_> {
    /// A command's life, until nothing more comes of it. Returns the `out` of `exit`, where it was
    /// ended.
    fn live(&mut self) -> Option<&'static str> {
        let pid = self.child.pid;
        self.stream.start(pid, self.client.limits.heartbeat.as_secs_f64());
        let cause = self.follow();
        if let Some(cause) = &cause {
            self.stream.event("err", "", cause.text.as_bytes());
            self.end_all();
        }
        // After a command's own end only its group is killed. (After `end_all` this finds nobody,
        // or hits again.)
        sys::send_group(pid, sys::SIGKILL);
        // What it has printed until now is still read, and sent.
        self.is_over.store(true, SeqCst);
        let killed = Instant::now();
        while self.open_outputs > 0 || (!sys::has_exited(pid) && killed.elapsed() < KILL_TIME) {
            self.turn();
        }
        cause.and_then(|cause| cause.out)
    }

    /// Streams the command until it ends by itself, or there is a cause to end it.
    fn follow(&mut self) -> Option<Cause> {
        let mut cause = None;
        while cause.is_none() && !sys::has_exited(self.child.pid) {
            cause = self.turn();
        }
        // What it left running in its group may print on, until that pauses.
        let exited = Instant::now();
        self.quiet_turns = 0;
        let is_quiet = |run: &Self| run.open_outputs == 0 || run.quiet_turns >= QUIET_TURNS;
        while cause.is_none() && !is_quiet(self) && exited.elapsed() < self.client.limits.grace {
            cause = self.turn();
        }
        cause
    }

    /// Asks all that the command started to end, waits until it has, and kills what then is left.
    fn end_all(&mut self) {
        // What is stopped would not notice before SIGCONT.
        self.child.signal(&[sys::SIGTERM, sys::SIGCONT]);
        let asked = Instant::now();
        while asked.elapsed() < self.client.limits.grace && !IS_URGENT.load(SeqCst) {
            // A turn with output shows that something lives, so /proc is read only after one
            // without. An open pipe shows nothing: a process outside the session may hold it.
            if self.quiet_turns > 0 && sys::has_exited(self.child.pid) && self.child.is_dead() {
                return;
            }
            self.turn();
        }
        self.child.signal(&[sys::SIGKILL]);
    }

    /// Why the command is to end.
    fn cause(&self) -> Option<Cause> {
        let timeout = self.client.limits.timeout;
        let is_late = !timeout.is_zero() && self.started.elapsed() >= timeout;
        if self.lost.is_some() {
            // Nobody is told.
            Some(Cause { out: None, text: "" })
        } else if self.starved.is_some() {
            Some(Cause { out: None, text: "the request's content broke off" })
        } else if sys::is_ending() {
            Some(Cause { out: Some("shutdown"), text: "the server is shutting down" })
        } else if is_late && !sys::has_exited(self.child.pid) {
            Some(Cause { out: Some("timeout"), text: "the command ran past --timeout" })
        } else {
            None
        }
    }

    /// Takes what comes, sends what there is, and looks after the client. Returns why the command
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

    /// Waits for a message, and encodes what it brings, and others that are there by then, for one
    /// write.
    fn receive(&mut self) {
        // Both outputs have ended, but not the leader: its exit is mostly a matter of microseconds,
        // and nothing tells of it.
        let is_exit_due = self.open_outputs == 0 && !sys::has_exited(self.child.pid);
        let wait = if is_exit_due { EXIT_WAIT * self.quiet_turns } else { TICK };
        let mut next = self.messages.recv_timeout(wait.min(TICK)).ok();
        self.quiet_turns = if next.is_some() { 0 } else { self.quiet_turns + 1 };
        while let Some(message) = next {
            match message {
                Message::Output(source, bytes) => {
                    if self.client.limits.verbose {
                        let (peer, pid) = (self.client.peer, self.child.pid);
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

    /// Writes what there is, as far as the client takes it within a tick. For one that is lost it
    /// is thrown away, so that the command can end.
    fn send(&mut self) {
        if self.stream.unsent.is_empty() || self.lost.is_some() {
            return self.stream.unsent.clear();
        }
        let is_servers_end = sys::is_ending() && self.is_over.load(SeqCst);
        let longest_stall = if is_servers_end { LAST_STALL } else { self.client.limits.stall };
        match self.client.socket.write(&self.stream.unsent) {
            Ok(length) => {
                self.stream.unsent.drain(..length);
                self.written = Instant::now();
            }
            // After a silence it can be over at once: the buffer is full of what was sent before,
            // of which nothing was taken.
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
        let state = sys::poll_one(self.client.socket, POLLIN | POLLRDHUP, Duration::ZERO);
        let is_half_closed = state & POLLRDHUP != 0;
        // As plain text a half-close counts as leaving.
        if state & (POLLERR | POLLHUP) != 0 || (is_half_closed && !self.stream.is_events) {
            self.lost.get_or_insert("gone");
        }
        // A client that has closed everything looks half-closed first, too. One comment decides:
        // who has closed answers it with a reset, which a later turn sees as POLLERR or POLLHUP.
        let is_in_doubt = is_half_closed && !self.is_probed;
        // Plain text is probed, as far as it can be, only while unread input waits (POLLIN): it may
        // fill TCP's window, behind which the client's end cannot arrive.
        let may_comment = self.stream.is_events || state & POLLIN != 0;
        let is_due = may_comment && self.written.elapsed() >= self.client.limits.heartbeat;
        if self.lost.is_none() && self.stream.unsent.is_empty() && (is_in_doubt || is_due) {
            self.is_probed = is_half_closed;
            self.stream.comment();
        }
    }

    /// Reaps the command and frees its place; sends the outcome, last of all, and logs it. Returns
    /// whether the client got it.
    fn finish(mut self, why_ended: Option<&'static str>, place: Place) -> bool {
        let status = self.child.reap();
        // Before `exit` is sent: who has read it may start the next command at once.
        drop(place);
        let code = status.and_then(|status| status.code());
        let signal = status.and_then(|status| status.signal());
        let mut out = why_ended.unwrap_or(if signal.is_some() { "killed" } else { "exited" });
        if status.is_none() {
            out = "left";
            self.stream.event("err", "", b"this server cannot kill the command, which goes on");
        }
        let numbers = self.stream.exit(out, code, signal, self.started.elapsed().as_millis());
        while !self.stream.unsent.is_empty() {
            self.send();
        }
        // That the command was left matters more than that the client was lost.
        let logged = if status.is_some() { self.lost.unwrap_or(out) } else { out };
        let (peer, pid) = (self.client.peer, self.child.pid);
        log::line(format_args!("exit peer={peer} pid={pid} out={logged}{numbers}"));
        self.lost.is_none()
    }
}
