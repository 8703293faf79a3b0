//! The path of one connection: its requests and their answers, one after the other.

use crate::child::Child;
use crate::config::USAGE;
use crate::log::{self, quoted};
use crate::output::{Outcome, Stream};
use crate::pipes::{Content, TICK, is_passing};
use crate::policy::{CommandLine, Rules, Verdict};
use crate::refusal::Refusal;
use crate::request::{Failure, Request, percent_decode};
use crate::response::{CONTINUE, Context};
use crate::run::{self, Client, Commands, End, Started};
use crate::sys;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// In which a head must have arrived whole, and a form, however it trickles; and the next request have begun.
const ARRIVAL_TIME: Duration = Duration::from_secs(5);
/// How long a client that was refused may go on sending.
const LINGER_TIME: Duration = Duration::from_secs(2);
/// Of input. A silent stream holds one, and most heads fit.
const BUFFER: usize = 1 << 10;

/// Serves a client until it or the server ends the connection.
pub fn serve(socket: &TcpStream, peer: SocketAddr, rules: &Rules, commands: &Commands) {
    let limits = &commands.limits;
    // Without the address that it came in on, nobody can say who is meant by `Host`.
    let Ok(local) = socket.local_addr() else {
        return;
    };
    // Each wait is a tick, so that whoever waits sees what else has happened.
    let is_ready = socket.set_read_timeout(Some(TICK)).is_ok()
        && socket.set_write_timeout(Some(TICK)).is_ok()
        && socket.set_nodelay(true).is_ok();
    if !is_ready {
        return;
    }
    sys::notice_dead_peer(socket, limits.heartbeat, limits.stall);
    let input = Input { socket, commands, deadline: Instant::now() + ARRIVAL_TIME };
    let mut connection = Connection {
        client: Client { socket, peer },
        local: local.ip().to_canonical(),
        rules,
        commands,
        input: BufReader::with_capacity(BUFFER, input),
    };
    while connection.exchange() {
        connection.allow(ARRIVAL_TIME);
        if connection.input.fill_buf().is_err() {
            return;
        }
        connection.allow(ARRIVAL_TIME);
    }
}

struct Connection<'a> {
    client: Client<'a>,
    /// The address that it came in on.
    local: IpAddr,
    rules: &'a Rules,
    commands: &'a Commands,
    input: BufReader<Input<'a>>,
}

/// What a client sends, up to a deadline and to the server's end.
struct Input<'a> {
    socket: &'a TcpStream,
    commands: &'a Commands,
    deadline: Instant,
}

impl Read for Input<'_> {
    /// Fails with `TimedOut` where the deadline has passed.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.socket.read(buffer) {
                Err(error) if is_passing(&error) => {}
                done => return done,
            }
            if self.commands.is_ending(End::Asked) {
                return Err(ErrorKind::ConnectionAborted.into());
            }
            if Instant::now() >= self.deadline {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }
}

impl Connection<'_> {
    /// Lets the client send for `time` from now.
    fn allow(&mut self, time: Duration) {
        self.input.get_mut().deadline = Instant::now() + time;
    }

    /// A request and its answer. Returns whether another request may follow.
    fn exchange(&mut self) -> bool {
        let mut request = Request::default();
        match request.read(&mut self.input) {
            Ok(()) => {}
            Err(Failure::Gone) => return false,
            Err(Failure::Refused(refusal)) => return self.refuse(&request, &[], &refusal),
        }
        match self.rules.judge(&request, self.local) {
            Ok(Verdict::ReadForm) => self.answer_form(&request),
            Ok(Verdict::Run(command)) => self.run(&request, &command, &[]),
            Ok(verdict) => self.answer(&request, &verdict),
            Err(refusal) => self.refuse(&request, &[], &refusal),
        }
    }

    /// Reads the form that holds the command, and runs it.
    fn answer_form(&mut self, request: &Request) -> bool {
        if request.expects_continue() && !self.write(CONTINUE) {
            return false;
        }
        self.allow(ARRIVAL_TIME);
        // The rules let no long one pass.
        let mut form = vec![0; request.content_length as usize];
        if let Err(error) = self.input.read_exact(&mut form) {
            let refusal = match error.kind() {
                ErrorKind::TimedOut => Refusal::Late("form did not arrive in time"),
                ErrorKind::UnexpectedEof => {
                    Refusal::Malformed("form", "send as many bytes as Content-Length says")
                }
                _ => return false,
            };
            return self.refuse(request, &[], &refusal);
        }
        match self.rules.command(&form) {
            Ok(command) => self.run(request, &command, &form),
            Err(refusal) => self.refuse(request, &form, &refusal),
        }
    }

    /// Starts a command and streams it. The content of a POST is its standard input, unless it was the form
    /// that the command came from.
    fn run(&mut self, request: &Request, command: &CommandLine, form: &[u8]) -> bool {
        let Some(place) = self.commands.place() else {
            return self.refuse(request, form, &Refusal::Busy("place for another command"));
        };
        let has_input = request.method == "POST" && request.content_length > 0 && form.is_empty();
        let (child, pipes) = match Child::start(&command.words, has_input) {
            Ok(started) => started,
            Err(refusal) if request.wants_events() && refusal.exit_code().is_some() => {
                drop(place);
                return self.stream_failure(request, &refusal);
            }
            Err(refusal) => return self.refuse(request, form, &refusal),
        };
        let context = self.context(request);
        let mut head = Vec::new();
        if request.expects_continue() && form.is_empty() {
            head.extend_from_slice(CONTINUE);
        }
        head.extend_from_slice(&context.stream_head());
        let begun = self.input.buffer();
        let here = begun.len().min(usize::try_from(request.content_length).unwrap_or(usize::MAX));
        let started = Started {
            child,
            pipes,
            place,
            text: &command.text,
            content: Content {
                begun: &begun[..here],
                length: request.content_length,
                socket: self.client.socket,
            },
            head,
            stream: Stream::new(request.wants_events(), request.minor_version > 0),
            is_events: request.wants_events(),
        };
        match run::run(started, &self.client, self.commands) {
            Ok(is_complete) => is_complete && self.goes_on(context.closes),
            Err(refusal) => self.refuse(request, form, &refusal),
        }
    }

    /// The stream of a command that could not be started.
    fn stream_failure(&mut self, request: &Request, refusal: &Refusal) -> bool {
        let told = refusal.told();
        let context = self.context(request);
        let mut outcome = Outcome::failed(refusal.exit_code().unwrap_or_default());
        let mut stream = Stream::new(true, request.minor_version > 0);
        stream.error(&format!("{} ({})", told.why, told.remedy));
        stream.exit(&mut outcome);
        let mut answer = context.stream_head();
        stream.take_content(&mut answer);
        stream.take_last_chunk(&outcome, &mut answer);
        run::log_exit(self.client.peer, 0, &outcome, &told.why);
        self.write(&answer) && self.goes_on(context.closes)
    }

    /// Answers what is neither a refusal nor a command.
    fn answer(&mut self, request: &Request, verdict: &Verdict) -> bool {
        let context = self.context(request);
        let answer = match verdict {
            Verdict::Page => context.page(),
            Verdict::Commands => context.text(&self.rules.listed()),
            Verdict::Methods(methods) => context.methods(methods),
            Verdict::Reconnect => context.nothing(),
            Verdict::Head => context.stream_head(),
            _ => context.text(USAGE),
        };
        self.write(&answer) && self.goes_on(context.closes)
    }

    /// Refuses a request, and logs what was asked for: in the target, or in the form that was read.
    fn refuse(&mut self, request: &Request, form: &[u8], refusal: &Refusal) -> bool {
        let mut context = self.context(request);
        context.closes |= refusal.ends_connection();
        let (peer, told) = (self.client.peer, refusal.told());
        let target = loggable(request.target.as_bytes());
        let command = if form.is_empty() { String::new() } else { logged_form(form) };
        let (status, why) = (told.status, quoted(told.why.as_bytes()));
        log::line(format_args!(
            "refuse peer={peer} status={status} target={target}{command} why={why}"
        ));
        self.write(&context.refusal(refusal)) && self.goes_on(context.closes)
    }

    fn context<'r>(&self, request: &'r Request) -> Context<'r> {
        Context {
            request,
            origin: self.rules.foreign_origin(request),
            closes: request.ends_connection() || self.commands.is_ending(End::Asked),
        }
    }

    /// Writes an answer whole, unless the client is gone or does not read.
    fn write(&self, mut bytes: &[u8]) -> bool {
        let mut socket = self.client.socket;
        let mut written = Instant::now();
        while !bytes.is_empty() {
            match socket.write(bytes) {
                Ok(length) => {
                    bytes = &bytes[length..];
                    written = Instant::now();
                }
                Err(error) if is_passing(&error) => {
                    let is_stalled = written.elapsed() >= self.commands.limits.stall;
                    if is_stalled || self.commands.is_ending(End::Asked) {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Whether another request may follow an answer. Where none may, ends the connection in a way that the
    /// answer survives: closing a socket with unread input sends a reset, which can overtake the answer and
    /// have it thrown away (RFC 9112 section 9.6). So the server says that nothing more comes, and reads
    /// what still does, for a moment.
    fn goes_on(&mut self, closes: bool) -> bool {
        if !closes && !self.commands.is_ending(End::Asked) {
            return true;
        }
        let _ = self.client.socket.shutdown(Shutdown::Write);
        self.allow(LINGER_TIME);
        let input = self.input.get_mut();
        let mut scratch = [0; 4096];
        while Instant::now() < input.deadline && input.read(&mut scratch).is_ok_and(|n| n > 0) {}
        false
    }
}

/// A target as sent, for the log; decoded where the token would hide behind escapes.
fn loggable(target: &[u8]) -> String {
    match percent_decode(target) {
        Some(decoded) if log::has_token(&decoded) => quoted(&decoded),
        _ => quoted(target),
    }
}

/// The command that a form asked for, as a value for the log, however much of the form is wrong.
fn logged_form(form: &[u8]) -> String {
    let text = percent_decode(form).unwrap_or_else(|| form.to_vec());
    let command = text.strip_prefix(b"command=").unwrap_or(&text);
    format!(" command={}", quoted(command))
}
