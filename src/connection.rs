//! The path of one connection: its requests and their answers, one after the other.

use crate::log::{self, quoted};
use crate::output::Stream;
use crate::pipes::{TICK, is_passing};
use crate::policy::{CommandLine, Rules, Verdict};
use crate::refusal::{self, Refusal, ensure};
use crate::request::{Request, percent_decode};
use crate::response::{CONTINUE, Context, USAGE};
use crate::run::{self, Client, Limits};
use crate::sys;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// In which a head must have arrived whole, and a form, however it trickles; and a next request begun.
const ARRIVAL_TIME: Duration = Duration::from_secs(5);
/// How long a client may go on sending after an answer that ends the connection.
const LINGER_TIME: Duration = Duration::from_secs(2);
/// Of input. A silent stream holds one, and most heads fit.
const BUFFER: usize = 1 << 10;

/// Serves a client until it or the server ends the connection, or the connection fails.
pub fn serve(
    socket: &TcpStream,
    peer: SocketAddr,
    rules: &Rules,
    limits: &Limits,
) -> io::Result<()> {
    let local = socket.local_addr()?.ip().to_canonical();
    // Each wait is a tick, so that whoever waits sees what else has happened.
    socket.set_read_timeout(Some(TICK))?;
    socket.set_write_timeout(Some(TICK))?;
    // Without it a client that keeps the connection waits for its second answer for 40 ms.
    socket.set_nodelay(true)?;
    sys::notice_dead_peer(socket, limits.heartbeat, limits.stall);
    let client = Client { socket, peer };
    let deadline = Instant::now() + ARRIVAL_TIME;
    let input = BufReader::with_capacity(BUFFER, Input { socket, deadline });
    let mut connection = Connection { client, local, rules, limits, input };
    while connection.exchange() {
        // The next request may begin so late, and then has as much time as the first one.
        connection.allow(ARRIVAL_TIME);
        connection.input.fill_buf()?;
        connection.allow(ARRIVAL_TIME);
    }
    Ok(())
}

struct Connection<'a> {
    client: Client<'a>,
    /// The address that it came in on.
    local: IpAddr,
    rules: &'a Rules,
    limits: &'a Limits,
    input: BufReader<Input<'a>>,
}

/// What a client sends, up to a deadline and to the server's end.
struct Input<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
}

impl Read for Input<'_> {
    /// Fails with `TimedOut` where the deadline has passed, also for one that sends a byte now and then.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while Instant::now() < self.deadline {
            match self.socket.read(buffer) {
                Err(error) if is_passing(&error) => {}
                done => return done,
            }
            if sys::is_ending() {
                return Err(ErrorKind::ConnectionAborted.into());
            }
        }
        Err(ErrorKind::TimedOut.into())
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
        let mut form = Vec::new();
        match self.try_exchange(&mut request, &mut form) {
            Ok(goes_on) => goes_on,
            Err(refusal) if refusal == refusal::GONE => false,
            Err(refusal) => self.refuse(&request, &form, &refusal),
        }
    }

    /// The same, where nothing is refused. `request` and `form` keep what was read.
    fn try_exchange(&mut self, request: &mut Request, form: &mut Vec<u8>) -> Result<bool, Refusal> {
        request.read(&mut self.input)?;
        let context = self.context(request);
        let answer = match self.rules.judge(request, self.local)? {
            Verdict::Run(command) => return self.run(&context, &command, true),
            Verdict::ReadForm => {
                self.read_form(request, form)?;
                let command = self.rules.command(form)?;
                return self.run(&context, &command, false);
            }
            Verdict::Page => context.page(),
            Verdict::Usage => context.text(USAGE),
            Verdict::Commands => context.text(&self.rules.listed()),
            Verdict::Methods(methods) => context.methods(methods),
            Verdict::Reconnect => context.nothing(),
            Verdict::Head => context.stream_head(),
        };
        Ok(self.write(&answer) && self.goes_on(context.closes))
    }

    /// Reads the form that holds the command; the rules have let no long one pass.
    fn read_form(&mut self, request: &Request, form: &mut Vec<u8>) -> Result<(), Refusal> {
        if request.expects_continue() && !self.write(CONTINUE.as_bytes()) {
            return Err(refusal::GONE);
        }
        self.allow(ARRIVAL_TIME);
        let length = request.content_length;
        (&mut self.input).take(length).read_to_end(form)?;
        ensure(form.len() as u64 == length, refusal::CUT)
    }

    /// Runs a command. Where `may_feed`, a POST's content is its standard input.
    fn run(
        &mut self,
        context: &Context,
        command: &CommandLine,
        may_feed: bool,
    ) -> Result<bool, Refusal> {
        let (request, length) = (context.request, context.request.content_length);
        let is_fed = may_feed && length > 0 && request.method == "POST";
        let mut head = context.stream_head();
        if may_feed && request.expects_continue() {
            head.splice(..0, CONTINUE.bytes());
        }
        let content = self.input.buffer().chain(self.client.socket).take(length);
        let stream = Stream::new(request.wants_events(), request.minor_version > 0, head);
        let is_complete =
            match run::run(command, is_fed.then_some(content), &self.client, self.limits, stream) {
                Err(refusal) if request.wants_events() && refusal.exit_code.is_some() => {
                    self.write(&self.failed_stream(context, &refusal))
                }
                done => done?,
            };
        Ok(is_complete && self.goes_on(context.closes))
    }

    /// The whole stream of a command that could not be started.
    fn failed_stream(&self, context: &Context, refusal: &Refusal) -> Vec<u8> {
        let words = refusal.words();
        let is_chunked = context.request.minor_version > 0;
        let mut stream = Stream::new(true, is_chunked, context.stream_head());
        stream.error(&words);
        let numbers = stream.exit("failed", refusal.exit_code, None, 0);
        let (peer, why) = (self.client.peer, quoted(words.as_bytes()));
        log::line(format_args!("exit peer={peer} pid=0 out=failed{numbers} why={why}"));
        stream.unsent().to_vec()
    }

    /// Refuses a request, and logs what was asked for: by the target, or by the form that was read.
    fn refuse(&mut self, request: &Request, form: &[u8], refusal: &Refusal) -> bool {
        let mut context = self.context(request);
        context.closes |= refusal.ends_connection;
        let (status, words) = (refusal.status, refusal.words());
        let (why, _) = words.split_once("; ").unwrap_or((&words, ""));
        let (peer, why) = (self.client.peer, quoted(why.as_bytes()));
        let target = request.target.as_bytes();
        let mut asked = format!("target={}", logged(target, target));
        if !form.is_empty() {
            let text = percent_decode(form).unwrap_or(form.to_vec());
            let command = text.strip_prefix(b"command=").unwrap_or(&text);
            asked += &format!(" command={}", logged(form, command));
        }
        log::line(format_args!("refuse peer={peer} status={status} {asked} why={why}"));
        self.write(&context.refusal(refusal)) && self.goes_on(context.closes)
    }

    fn context<'r>(&self, request: &'r Request) -> Context<'r> {
        let origin = self.rules.foreign_origin(request);
        let closes = request.ends_connection() || sys::is_ending();
        Context { request, origin, closes }
    }

    /// Writes an answer whole, unless the client is gone, or does not read.
    fn write(&self, mut bytes: &[u8]) -> bool {
        let mut socket = self.client.socket;
        let mut written = Instant::now();
        while !bytes.is_empty() {
            match socket.write(bytes) {
                Ok(length) => {
                    bytes = &bytes[length..];
                    written = Instant::now();
                }
                Err(error) if !is_passing(&error) => return false,
                Err(_) if sys::is_ending() || written.elapsed() >= self.limits.stall => {
                    return false;
                }
                Err(_) => {}
            }
        }
        true
    }

    /// Whether another request may follow an answer. Where none may, ends the connection so that the answer
    /// survives: closing a socket with unread input sends a reset, which can overtake the answer and have it
    /// thrown away (RFC 9112 section 9.6). So the server says that nothing more comes, and reads what still
    /// does, for a moment.
    fn goes_on(&mut self, closes: bool) -> bool {
        if closes {
            let _ = self.client.socket.shutdown(Shutdown::Write);
            self.allow(LINGER_TIME);
            let input = self.input.get_mut();
            let mut scratch = [0; 4096];
            while Instant::now() < input.deadline && input.read(&mut scratch).is_ok_and(|n| n > 0) {
            }
        }
        !closes
    }
}

/// A text for the log, in its readable form; where the token hides behind escapes of what was sent, what that
/// stands for, with the token masked. Unlike in a command, a malformed escape and a `+` stand for themselves:
/// a token has no blank, and no part of it is to be seen beside them.
fn logged(sent: &[u8], readable: &[u8]) -> String {
    let (mut meant, mut rest) = (Vec::new(), sent);
    while let Some(&byte) = rest.first() {
        let escape = if byte == b'%' { rest.get(..3) } else { None };
        if let Some(decoded) = escape.and_then(percent_decode) {
            meant.extend(decoded);
            rest = &rest[3..];
        } else {
            meant.push(byte);
            rest = &rest[1..];
        }
    }
    quoted(if log::has_token(&meant) { &meant } else { readable })
}
